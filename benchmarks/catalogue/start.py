"""What thousands of names cost at the start, in a list, and on a request's way to an adapter that is there."""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import torch

from benchmarks.catalogue.fleet import Fleet
from benchmarks.catalogue.gate import Gate, PartResult
from benchmarks.catalogue.plan import Plan
from gralora.v1 import adapters_pb2, adapters_pb2_grpc
from gralora_runtime.adapters.catalogue.sources.directory import DirectorySource
from gralora_runtime.adapters.manager import AdapterManager
from gralora_server.client.connection import MAX_MESSAGE_BYTES
from gralora_server.loadtest.local_server import running

FEW = 100  # names beside which all of them are looked at
PAGE = 500
RESIDENT = 16
LOOKED_INTO_S = 120.0
START_S, PAGE_S, ACQUIRE_RATIO = 3.0, 0.020, 1.2


def start(fleet: Fleet, plan: Plan, folder: Path) -> PartResult:
    """Changes nothing in the fleet's directory."""
    empty = folder / "empty"
    empty.mkdir()
    few = _some_of(fleet, folder / "few")
    pairs, pages_s = [], list[float]()
    for _ in range(plan.starts):
        without_s, _ = _start_s(fleet, empty, 0)
        with_s, listed_s = _start_s(fleet, fleet.directory, plan.pages)
        pairs.append((without_s, with_s))
        pages_s += listed_s
    rounds = [(_acquire_s(fleet, few, plan), _acquire_s(fleet, fleet.directory, plan)) for _ in range(plan.rounds)]
    figures: dict[str, Any] = {
        "adapters": len(fleet.initial),
        "start_s": [[round(value, 3) for value in pair] for pair in pairs],
        "page_ms": round(1e3 * statistics.median(pages_s), 2),
        "acquire_us": [[round(1e6 * value, 2) for value in pair] for pair in rounds],
    }
    added_s = statistics.median(with_s - without_s for without_s, with_s in pairs)
    ratio = statistics.median(many / some for some, many in rounds)
    return PartResult(
        figures,
        [
            Gate("seconds that all names add to the start", added_s, START_S, is_speed=True),
            Gate("seconds of a page of the list", statistics.median(pages_s), PAGE_S, is_speed=True),
            Gate("acquiring, all names over few", ratio, ACQUIRE_RATIO, is_speed=True),
        ],
    )


def _some_of(fleet: Fleet, folder: Path) -> Path:
    for name in list(fleet.initial)[:FEW]:
        shutil.copytree(fleet.directory / name, folder / name)
    return folder


def _start_s(fleet: Fleet, adapters: Path, pages: int) -> tuple[float, list[float]]:
    """From the process's beginning until it serves; and so many times of a page of its list."""
    command = ["serve", "--model", str(fleet.contents.base.path), "--adapters", str(adapters)]
    command += ["--address", "127.0.0.1:0", "--log-level", "error", "--device", "cpu"]
    command += ["--kv-cache-bytes", "64MiB", "--adapter-pool-bytes", "64MiB"]
    begin_s = time.perf_counter()
    with running(command) as server:
        started_s = time.perf_counter() - begin_s
        options = [("grpc.max_receive_message_length", MAX_MESSAGE_BYTES)]
        with grpc.insecure_channel(server.address, options=options) as channel:
            stub = adapters_pb2_grpc.AdapterServiceStub(channel)
            _wait_for(lambda: _all_looked_into(stub))
            return started_s, [_page_s(stub) for _ in range(pages)]


def _wait_for(is_so: Callable[[], bool]) -> None:
    """Headers are read beside serving, and would be measured with what is."""
    until_s = time.monotonic() + LOOKED_INTO_S
    while not is_so():
        assert time.monotonic() < until_s, "the adapters' headers have not been read"
        time.sleep(0.1)


def _all_looked_into(stub: adapters_pb2_grpc.AdapterServiceStub) -> bool:
    token, more = "", True
    while more:
        page = stub.ListAdapters(adapters_pb2.ListAdaptersRequest(page_size=PAGE, page_token=token), timeout=20.0)
        if any(adapter.num_modules == 0 for adapter in page.adapters):
            return False
        token, more = page.next_page_token, page.next_page_token != ""
    return True


def _page_s(stub: adapters_pb2_grpc.AdapterServiceStub) -> float:
    begin_s = time.perf_counter()
    page = stub.ListAdapters(adapters_pb2.ListAdaptersRequest(page_size=PAGE), timeout=20.0)
    taken_s = time.perf_counter() - begin_s
    assert len(page.adapters) == min(PAGE, page.total_size)
    return taken_s


def _acquire_s(fleet: Fleet, adapters: Path, plan: Plan) -> float:
    """Acquiring and releasing a resident adapter, in this process."""
    with _managing(fleet, adapters) as manager:
        _wait_for(lambda: all(info.summary is not None for info in manager.list()))
        names = [info.name for info in manager.list()][:RESIDENT]
        for name in names:
            manager.release(manager.acquire(name).result(60))
        begin_s = time.perf_counter()
        _acquire_all(manager, names, plan.acquires)
        return (time.perf_counter() - begin_s) / plan.acquires


def _acquire_all(manager: AdapterManager, names: Sequence[str], count: int) -> None:
    for number in range(count):
        manager.release(manager.acquire(names[number % len(names)]).result(60))


@contextmanager
def _managing(fleet: Fleet, adapters: Path) -> Iterator[AdapterManager]:
    manager = AdapterManager(
        modules=fleet.contents.base.modules,
        device=torch.device("cpu"),
        dtype=torch.float32,
        pool_bytes=64 << 20,
        max_slots=64,
        host_cache_bytes=0,
        sources=[DirectorySource(adapters)],
        base_model="",
        base_norms={},
        max_width=2048,
    )
    try:
        yield manager
    finally:
        manager.close()
