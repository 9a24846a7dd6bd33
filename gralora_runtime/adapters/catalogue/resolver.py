"""Finds names that nobody has asked for before: in one source after the other, once at a time for each name.

Every source is asked in threads of its own, so a slow one delays only names that no source before it has.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from gralora_runtime.adapters.catalogue.sources.source import Found, Source
from gralora_runtime.errors import AdapterNotFoundError, DrainingError

THREADS_PER_SOURCE = 2
MAX_ABSENT = 4096  # names that were not found lately; more are asked about again
ABSENT_S = 1.0  # for so long: what is copied into a directory is found after that, watched or not


@dataclass(frozen=True, slots=True)
class Resolved:
    """Where a name was found."""

    source: Source
    found: Found


class Resolver:
    """Answers come in a source's thread, or at once for a name that was not found a moment ago."""

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        similar: Callable[[str], str] = lambda _: "",
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """`similar`: a name that somebody may have meant, for messages."""
        self._sources = tuple(sources)
        self._similar = similar
        self._now_s = now_s
        self._lock = threading.Lock()
        self._asked: dict[str, list[Future[Resolved]]] = {}  # by name: who waits for the answer
        self._again: set[str] = set()  # names whose files came or changed while they were asked for
        # By name, the oldest first: until when it counts as absent, and what is answered.
        self._absent: OrderedDict[str, tuple[float, AdapterNotFoundError]] = OrderedDict()
        self._closed = False
        self._threads = [
            ThreadPoolExecutor(THREADS_PER_SOURCE, thread_name_prefix="adapter-source") for _ in self._sources
        ]

    def resolve(self, name: str) -> Future[Resolved]:
        """Where the name is, AdapterNotFoundError, or why the first source that may have it could not say."""
        future: Future[Resolved] = Future()
        with self._lock:
            absent = self._absent_error(name)
            is_first = name not in self._asked
            if absent is None and not self._closed:
                self._asked.setdefault(name, []).append(future)
        if self._closed:
            future.set_exception(DrainingError())
        elif absent is not None:
            future.set_exception(absent)
        elif is_first:
            self._ask(name, 0)
        return future

    def appeared(self, name: str) -> None:
        """Something changed where it may be: ask again."""
        with self._lock:
            self._absent.pop(name, None)
            if name in self._asked:
                self._again.add(name)

    def close(self) -> None:
        """Answer everybody, and wait for what is being asked."""
        with self._lock:
            self._closed = True
            waiting = [future for futures in self._asked.values() for future in futures]
            self._asked.clear()
        for future in waiting:
            _refuse(future, DrainingError())
        for threads, source in zip(self._threads, self._sources, strict=True):
            threads.shutdown(cancel_futures=True)
            source.close()

    def _ask(self, name: str, position: int) -> None:
        if position == len(self._sources):
            self._answer_absent(name)
            return
        source = self._sources[position]
        try:
            asked = self._threads[position].submit(source.find, name)
        except RuntimeError:  # shut down meanwhile: everybody has their answer
            return
        asked.add_done_callback(partial(self._on_asked, name, position))

    def _on_asked(self, name: str, position: int, asked: Future[Found | None]) -> None:
        try:
            found = asked.result()
        except CancelledError:
            return
        except Exception as error:
            for future in self._take(name):
                _refuse(future, error)
            return
        if found is None:
            self._ask(name, position + 1)
            return
        resolved = Resolved(self._sources[position], found)
        for future in self._take(name):
            if future.set_running_or_notify_cancel():
                future.set_result(resolved)

    def _answer_absent(self, name: str) -> None:
        error = AdapterNotFoundError(name, self._similar(name))
        waiting: list[Future[Resolved]] = []
        with self._lock:
            again = name in self._again
            self._again.discard(name)
            if not again:
                self._absent[name] = (self._now_s() + ABSENT_S, error)
                self._absent.move_to_end(name)
                while len(self._absent) > MAX_ABSENT:
                    self._absent.popitem(last=False)
                waiting = self._asked.pop(name, [])
        if again:
            self._ask(name, 0)
        for future in waiting:
            _refuse(future, error)

    def _take(self, name: str) -> list[Future[Resolved]]:
        with self._lock:
            self._again.discard(name)
            return self._asked.pop(name, [])

    def _absent_error(self, name: str) -> AdapterNotFoundError | None:
        until_s, error = self._absent.get(name, (0.0, None))
        if error is None or self._now_s() >= until_s:
            return None
        return error.again()


def _refuse(future: Future[Resolved], error: BaseException) -> None:
    if future.set_running_or_notify_cancel():
        future.set_exception(error)
