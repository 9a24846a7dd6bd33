"""The door between the transport and the engine: is there an engine, may new work enter, and what work is inside.

Knows no transport. All of it belongs to the event loop's thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum, auto

from gralora_runtime.errors import DrainingError, EngineDeadError, GraloraError
from gralora_server.errors import EngineStuckError, StartingError
from gralora_server.ports import Engine


class Phase(Enum):
    STARTING = auto()
    SERVING = auto()
    DRAINING = auto()
    DEAD = auto()


class Gate:
    """Starts closed. Phases follow each other only in the order of `Phase`."""

    def __init__(self, absent: Callable[[], GraloraError] = StartingError) -> None:
        """`absent`: why there is no engine."""
        self.phase = Phase.STARTING
        self.stuck = False  # for as long as a step does not end
        self._absent = absent
        self._engine: Engine | None = None
        self._inside: set[asyncio.Task[object]] = set()
        self._evicted_by: GraloraError | None = None
        self._listening: set[asyncio.Event] = set()

    @property
    def engine(self) -> Engine:
        """For calls that are no new work: allowed while draining."""
        if self.phase is Phase.DEAD:
            raise EngineDeadError
        if self._engine is None:
            raise DrainingError if self.phase is Phase.DRAINING else self._absent()
        return self._engine

    @property
    def loaded(self) -> Engine | None:
        """For those who only look, in whatever phase and from any thread."""
        return self._engine

    @contextmanager
    def admit(self) -> Iterator[Engine]:
        """New work: refused while starting, stuck and draining, counted until it ends, and evictable."""
        engine = self.engine
        if self.phase is Phase.DRAINING:
            raise DrainingError
        if self.stuck:
            raise EngineStuckError
        task = asyncio.current_task()
        assert task is not None
        self._inside.add(task)
        try:
            yield engine
        except asyncio.CancelledError:
            if self._evicted_by is None:
                raise
            # It was `evict` that cancelled, not the client: the caller is owed a status, so the task goes on.
            task.uncancel()
            raise self._evicted_by from None
        finally:
            self._inside.discard(task)

    @contextmanager
    def listen(self) -> Iterator[asyncio.Event]:
        """For calls that only tell what happens. The event is set when draining begins; they end then, at once."""
        woken = asyncio.Event()
        self._listening.add(woken)
        try:
            yield woken
        finally:
            self._listening.discard(woken)

    def open(self, engine: Engine) -> None:
        assert self.phase is Phase.STARTING
        self._engine = engine
        self.phase = Phase.SERVING

    def begin_drain(self) -> None:
        if self.phase is Phase.DEAD:
            return
        self.phase = Phase.DRAINING
        self._wake_listeners()
        if self._engine is not None:
            self._engine.begin_drain()

    def declare_dead(self) -> None:
        self.phase = Phase.DEAD
        self._wake_listeners()

    def _wake_listeners(self) -> None:
        for woken in self._listening:
            woken.set()

    async def wait_empty(self, timeout_s: float) -> bool:
        """Whether all that was inside ended in time, statuses included."""
        if self._inside:
            _, left = await asyncio.wait(self._inside, timeout=timeout_s)
            return not left
        return True

    def evict(self, error: GraloraError) -> None:
        """End everything inside with this error."""
        self._evicted_by = error
        for task in self._inside:
            task.cancel()
