"""The thread that steps the engine: takes commands, hands a step's outputs over in one call, and waits for nobody."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from gralora_runtime.errors import EngineDeadError
from gralora_runtime.failure import contained
from gralora_runtime.observation.steps import Phase
from gralora_runtime.scheduling.scheduler import Scheduler, StepOutput
from gralora_runtime.stepping.engine import Engine

logger = logging.getLogger(__name__)

MAX_FAILED_DELIVERIES_IN_A_ROW = 3  # then nobody is there to deliver to

Command = Callable[[Scheduler], None]


class EngineThread:
    """Runs commands between steps. `deliver` and `on_death` are called on this thread and must return at once.

    `turn` is entered for each step: engines that share it step one at a time. What fails for one request or in one step
    ends there; `on_death` is called when one step after the other failed, or one delivery, or something of this thread.
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
        self._lost: list[tuple[str, BaseException]] = []  # requests whose outputs could not be delivered, and why
        self._failed_deliveries_in_a_row = 0
        self._inbox: list[tuple[str, Command]] = []
        self._stopping = False
        self._condition = threading.Condition()
        self.busy_since_s: float | None = None  # when this round of commands and a step began; None: it waits for work
        self._thread = threading.Thread(target=self._run, name="gralora-engine", daemon=True)

    def start(self) -> None:
        """Begin stepping."""
        self._thread.start()

    def post(self, request_id: str, command: Command) -> None:
        """Run `command`, which concerns that request alone, on the engine's thread before its next step."""
        with self._condition:
            self._inbox.append((request_id, command))
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
            self._step_until_stopped()
        except BaseException:
            logger.critical("the engine thread ends", exc_info=True)
            self._hand_over()
            self._on_death()
        finally:
            self.busy_since_s = None
            self._engine.close()

    def _step_until_stopped(self) -> None:
        """Raises `EngineDeadError` when there is no point in going on."""
        while self._take_commands():
            with self._turn:
                outputs = self._engine.step(self._hand_over)
                if self._shares_turns:
                    outputs += self._engine.finish()  # nothing of this engine runs in another's turn
            self._outputs += outputs  # the step may have failed before what came before it was handed over
            self._end_lost()
            if self._shares_turns or not self._engine.has_work:
                self._hand_over()
            if self._engine.is_failing or self._failed_deliveries_in_a_row >= MAX_FAILED_DELIVERIES_IN_A_ROW:
                raise EngineDeadError
        self._outputs += self._engine.finish()
        self._hand_over()
        if self._lost:
            raise EngineDeadError

    def _hand_over(self) -> None:
        """A step's outputs go out when this thread has nothing to do but wait for the next one: whoever writes them to
        clients runs Python, and would keep this thread from its own. A forward pass needs none.
        """
        outputs, self._outputs = self._outputs, []
        if not outputs:
            return
        try:
            self._engine.observation.timed(Phase.DELIVER, self._deliver, outputs)
            self._failed_deliveries_in_a_row = 0
        except BaseException as error:
            if not contained(error):
                raise
            self._failed_deliveries_in_a_row += 1
            self._lost += [(output.request_id, error) for output in outputs]

    def _end_lost(self) -> None:
        """Whoever missed something must not get what comes after it, so the request ends. Between steps only."""
        lost, self._lost = dict(self._lost), []
        if lost:
            self._outputs = [output for output in self._outputs if output.request_id not in lost]
            for request_id, error in lost.items():
                self._engine.scheduler.fail(request_id, error)
            self._outputs += self._engine.scheduler.take_outputs()

    def _take_commands(self) -> bool:
        """Wait until there is something to do, do what was posted, and say whether to go on."""
        scheduler = self._engine.scheduler
        self.busy_since_s = None
        with self._condition:
            while not (self._inbox or self._stopping or self._engine.has_work or self._outputs or self._lost):
                self._condition.wait()
            commands, self._inbox = self._inbox, []
            stopping = self._stopping
        self.busy_since_s = time.monotonic()
        for request_id, command in commands:
            try:
                command(scheduler)
            except BaseException as error:
                if not contained(error):
                    raise
                scheduler.fail(request_id, error)
        return not stopping
