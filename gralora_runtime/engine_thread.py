"""The thread that steps the engine: takes commands, hands a step's outputs over in one call, and waits for nobody."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from gralora_runtime.engine import Engine
from gralora_runtime.observation.steps import Phase
from gralora_runtime.scheduler import Scheduler, StepOutput

logger = logging.getLogger(__name__)

Command = Callable[[Scheduler], None]


class EngineThread:
    """Runs commands between steps. `deliver` and `on_death` are called on this thread and must return at once.

    `turn` is entered for each step: engines that share it step one at a time.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        prepare: Callable[[], None],
        deliver: Callable[[list[StepOutput]], None],
        on_death: Callable[[], None],
        turn: AbstractContextManager[object] | None = None,
    ) -> None:
        self._engine = engine
        self._prepare = prepare
        self._deliver = deliver
        self._on_death = on_death
        self._turn = turn if turn is not None else nullcontext()
        self._shares_turns = turn is not None  # then the next step may be long in coming
        self._outputs: list[StepOutput] = []
        self._inbox: list[Command] = []
        self._stopping = False
        self._condition = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="gralora-engine", daemon=True)

    def start(self) -> None:
        """Begin stepping."""
        self._thread.start()

    def post(self, command: Command) -> None:
        """Run `command` on the engine's thread before its next step."""
        with self._condition:
            self._inbox.append(command)
            self._condition.notify()

    def stop(self) -> None:
        """Finish the step that is running, retire every sequence, and end the thread."""
        with self._condition:
            self._stopping = True
            self._condition.notify()
        self._thread.join()

    def _run(self) -> None:
        try:
            self._prepare()
            while self._take_commands():
                with self._turn:
                    self._outputs = self._engine.step(self._hand_over)
                if self._shares_turns or not self._engine.scheduler.has_work:
                    self._hand_over()
            self._hand_over()
        except Exception:
            logger.exception("the engine thread failed")
            self._hand_over()
            self._on_death()
        finally:
            self._engine.scheduler.abandon_all()

    def _hand_over(self) -> None:
        """A step's outputs go out when the next one's forward pass begins: whoever writes them to clients runs Python,
        and would keep this thread from its own, with all cores idle meanwhile. A compiled forward pass needs none.
        """
        outputs, self._outputs = self._outputs, []
        if outputs:
            self._engine.observation.timed(Phase.DELIVER, self._deliver, outputs)

    def _take_commands(self) -> bool:
        """Wait until there is something to do, do what was posted, and say whether to go on."""
        scheduler = self._engine.scheduler
        with self._condition:
            while not (self._inbox or self._stopping or scheduler.has_work):
                self._condition.wait()
            commands, self._inbox = self._inbox, []
            stopping = self._stopping
        for command in commands:
            command(scheduler)
        return not stopping
