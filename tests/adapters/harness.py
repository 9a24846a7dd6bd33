"""A manager over a directory of small adapters, and a way to wait until its threads have nothing left to do."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
import torch
from support.checkpoints import MODULES, write_gralora

from gralora_runtime.adapters.catalogue.sources.directory import DirectorySource
from gralora_runtime.adapters.checkpoint.header import inspect
from gralora_runtime.adapters.manager import AdapterManager
from gralora_runtime.adapters.residency import mover
from gralora_runtime.adapters.residency.lease import AdapterLease
from gralora_runtime.adapters.residency.mover import NUM_READERS, READ_AHEAD

WAIT_S = 20.0  # for what must happen; a test that fails waits so long
UNIT_BYTES = 4 * sum(4 * (module.in_features + module.out_features) for module in MODULES)  # an adapter of rank 4


def write_units(root: Path, names: Sequence[str], *, units: int = 1) -> None:
    """Adapters that take `units` units of a pool each, all different."""
    for name in names:
        path = write_gralora(root / name, r=4 * units, k=2, seed=crc32(name.encode()))
        assert units * UNIT_BYTES == 4 * inspect(path).summary(MODULES).packed_numel


def manager_of(root: Path | None, *, units: float = 2, slots: int = 8, host_units: float = 4, **options: Any) -> Any:
    settings: dict[str, Any] = {
        "modules": MODULES,
        "device": torch.device("cpu"),
        "dtype": torch.float32,
        "pool_bytes": int(units * UNIT_BYTES),
        "max_slots": slots,
        "host_cache_bytes": int(host_units * UNIT_BYTES),
        "sources": [DirectorySource(root)] if root else [],
        "base_model": "toy",
        "base_norms": {},
        "max_width": 256,
    }
    return AdapterManager(**settings | options)


@contextmanager
def managing(root: Path | None, **options: Any) -> Iterator[AdapterManager]:
    """Closed at the end, and its books are checked."""
    manager = manager_of(root, **options)
    try:
        yield manager
        manager.check_integrity()
    finally:
        manager.close()


def lease(manager: AdapterManager, name: str) -> AdapterLease:
    return manager.acquire(name).result(WAIT_S)


def use(manager: AdapterManager, name: str) -> AdapterLease:
    """One request from beginning to end."""
    held = lease(manager, name)
    manager.release(held)
    return held


def quiesce(manager: AdapterManager) -> None:
    """Returns when every read and every move that was under way or followed from one is done."""
    for _ in range(READ_AHEAD):  # a read leads to a move, which may lead to a read; so many are read at most
        barrier = threading.Barrier(NUM_READERS)
        for future in [manager._mover._readers.submit(barrier.wait) for _ in range(NUM_READERS)]:
            future.result(WAIT_S)
        manager._mover._placer.submit(int).result(WAIT_S)
        manager._discovery._refresher.submit(int).result(WAIT_S)
    manager.check_integrity()


def is_pending(manager: AdapterManager, future: Future[Any]) -> bool:
    quiesce(manager)
    return not future.done()


def weights(manager: AdapterManager, held: AdapterLease) -> torch.Tensor:
    resident = manager.pool.find(held.digest)
    assert resident is not None
    assert (held.slot, held.generation) == (resident.slot, resident.generation)
    return manager.pool.read(resident).blob


class Gate:
    """Stands before `load`: lets tests hold reads back, count them, and see which thread they run in."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        self.threads: set[str] = set()
        self.begun = threading.Semaphore(0)
        self._open = threading.Event()
        self._open.set()
        self._load: Callable[..., Any] = mover.load
        patch.setattr(mover, "load", self._gated)

    def shut(self) -> None:
        self._open.clear()

    def open(self) -> None:
        self._open.set()

    def wait_for_a_read(self) -> None:
        assert self.begun.acquire(timeout=WAIT_S)

    def _gated(self, name: str, *args: Any, **options: Any) -> Any:
        self.names.append(name)
        self.threads.add(threading.current_thread().name)
        self.begun.release()
        assert self._open.wait(WAIT_S)
        return self._load(name, *args, **options)


def until(condition: Callable[[], object]) -> None:
    """For what other threads and the file system do when they come to it."""
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.005)
