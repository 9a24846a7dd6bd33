"""Answers decided under a lock and given outside of it: whoever waits for a future may call us back at once."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import Any

from gralora_runtime.adapters.residency.lease import AdapterLease


class Answers:
    """Collects results, errors and calls; `deliver` hands them out in that order, once."""

    def __init__(self, take_back: Callable[[AdapterLease], None]) -> None:
        self._take_back = take_back  # a lease whose future was cancelled in the meantime
        self._calls: list[Callable[[], object]] = []

    def result(self, future: Future[Any], result: object) -> None:
        self._calls.append(lambda: self._answer(future, result))

    def error(self, future: Future[Any], error: BaseException) -> None:
        self._calls.append(lambda: self._refuse(future, error))

    def later(self, call: Callable[[], object]) -> None:
        self._calls.append(call)

    def deliver(self) -> None:
        for call in self._calls:
            call()

    def _answer(self, future: Future[Any], result: object) -> None:
        try:
            future.set_result(result)
        except InvalidStateError:
            if isinstance(result, AdapterLease):
                self._take_back(result)

    @staticmethod
    def _refuse(future: Future[Any], error: BaseException) -> None:
        with suppress(InvalidStateError):  # cancelled in the meantime: nobody waits for the error
            future.set_exception(error)
