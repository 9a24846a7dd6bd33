"""Tries a version's golden prompts before anybody gets it: one after another, tenants in turn, in its own thread.

Knows no engine: an `Examiner` answers a prompt with the lease that it is given. Knows not what becomes of the version.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from gralora_runtime.adapters.catalogue.store import AdapterVersion, Waiter
from gralora_runtime.adapters.checkpoint.golden import GoldenAnswer, GoldenCase, difference, read_golden
from gralora_runtime.adapters.checkpoint.header import GOLDEN_FILE
from gralora_runtime.adapters.checkpoint.spec import rejected
from gralora_runtime.adapters.residency.lease import AdapterLease
from gralora_runtime.adapters.turns import Turns
from gralora_runtime.errors import AdapterRejectedError, DrainingError, InvalidRequestError

log = logging.getLogger(__name__)

# Answers greedily, in as many tokens as the case expects; sees to it that the lease is released.
Examiner = Callable[[GoldenCase, AdapterLease], Future[GoldenAnswer]]
Decided = Callable[[AdapterVersion, AdapterLease, BaseException | None], None]

_NOBODY = (Waiter(future=Future(), wants_lease=False),)  # an operator's, then


class Admission:
    """Begins trials, and says how each ended. Prompts are answered beside the traffic, one at a time."""

    def __init__(self, *, vocab_size: int, acquire: Callable[[AdapterVersion], AdapterLease], decided: Decided) -> None:
        """`acquire`: another lease on a version that is being tried. `decided`: gets the trial's own lease back."""
        self._vocab_size = vocab_size
        self._acquire = acquire
        self._decided = decided
        self._examiner: Future[Examiner] = Future()
        self._lock = threading.Lock()  # taken with the manager's held, and never the other way round
        self._waiting: Turns[AdapterVersion] = Turns()
        self._held: dict[AdapterVersion, AdapterLease] = {}  # of those that wait
        self._trying = ThreadPoolExecutor(1, thread_name_prefix="adapter-trials")

    def examine_with(self, examiner: Examiner) -> None:
        """From now on there is somebody who answers; trials that began before have waited for that."""
        self._examiner.set_result(examiner)

    def begin(self, version: AdapterVersion, held: AdapterLease, waiters: Sequence[Waiter]) -> None:
        """`held` keeps the weights where they are until the trial is decided. `waiters`: who is in line for it."""
        with self._lock:
            self._held[version] = held
            for waiter in waiters or _NOBODY:
                self._waiting.add(version, waiter.tenant, waiter.weight)
        self._trying.submit(self._try_next)

    def hurry(self, version: AdapterVersion, waiter: Waiter) -> None:
        """Somebody more waits for this version, whose trial may not have begun."""
        with self._lock:
            if version in self._waiting:
                self._waiting.add(version, waiter.tenant, waiter.weight)

    def close(self) -> None:
        """Once the engine has ended its requests. Trials that had not begun are never decided."""
        if not self._examiner.done():
            self._examiner.set_exception(DrainingError())
        self._trying.shutdown(cancel_futures=True)

    def _try_next(self) -> None:
        with self._lock:
            version = next(iter(self._waiting))
            self._waiting.take(version)
            held = self._held.pop(version)
        self._try(version, held)

    def _try(self, version: AdapterVersion, held: AdapterLease) -> None:
        error: BaseException | None = None
        try:
            self._answer_all(version, held.added_tokens)
        except BaseException as problem:
            error = problem
        try:
            self._decided(version, held, error)
        except Exception:  # ours, and nobody waits for this thread's result
            log.exception("the trial of %s could not be ended", version.label)

    def _answer_all(self, version: AdapterVersion, added_tokens: int) -> None:
        directory, roots = version.place
        try:
            golden = read_golden(directory, vocab_size=self._vocab_size + added_tokens, roots=roots)
        except AdapterRejectedError as error:
            raise AdapterRejectedError(version.name, error.problems) from error  # whatever its directory is called
        if golden is None:
            return
        examine = self._examiner.result()
        for at, case in enumerate(golden.cases):
            try:
                problem = difference(case, examine(case, self._acquire(version)).result())
            except InvalidRequestError as error:
                problem = f": {error}"
            if problem:
                made = f" (made with the base model {golden.model!r})" if golden.model else ""
                raise rejected(version.name, [f"{GOLDEN_FILE}: cases[{at}]{problem}{made}"])
