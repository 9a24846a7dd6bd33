"""The engine around the GPU's steps: pipelined, with sampling; in process, and behind gRPC with clients elsewhere.

How busy the GPU is: what its steps take alone, by `step_ms` of the same engine, over the time in which they were done.
"""

from __future__ import annotations

import asyncio
import importlib.util
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from benchmarks.gpu_check.clock import step_times
from benchmarks.gpu_check.engines import CheckedEngine, Kind
from benchmarks.gpu_check.speed import DTYPE, ON_GPU, engine_sizes
from benchmarks.host.streams import ask, clients_of, window
from benchmarks.sequences import GREEDY, Everybody, make_sequence
from benchmarks.worker import Worker
from gralora_runtime.adapters.residency.lease import AdapterLease
from gralora_runtime.async_engine import AsyncEngine
from gralora_runtime.config import EngineConfig
from gralora_runtime.request import SamplingParams
from gralora_runtime.scheduling.sequence import Sequence as EngineSequence

SHAPE = "llama-3-8b" if ON_GPU else "tiny"
KIND: Kind = (16, 4)
STREAMS = (16, 64, 128) if ON_GPU else (2,)
PROMPT, TOKENS = (192, 200) if ON_GPU else (4, 4)
CLIENTS = 2 if ON_GPU else 1  # processes
CLIENTS_NEED = ("grpc", "uvloop", "google.protobuf")

Case = dict[str, Any]


def served(_: object) -> Iterator[Case]:
    """Each number of streams, all of them customers of their own."""
    engine = CheckedEngine(SHAPE, DTYPE, pipeline="on", **engine_sizes(SHAPE))
    kinds = engine.fitting([KIND] * STREAMS[-1])
    engine.fill(kinds)
    counts = [count for count in STREAMS if count <= len(kinds)]
    bounds = {count: _step_ms(engine, count, kinds) for count in counts}
    for count in counts:
        yield _case("in process", count, bounds[count], _in_process(engine, count, kinds))
    if missing := [name for name in CLIENTS_NEED if importlib.util.find_spec(name.split(".")[0]) is None]:
        yield {"what": "skipped", "shape": "served behind gRPC", "reason": f"needs {', '.join(missing)}"}
        return
    with _Service(engine, kinds) as address, clients_of(address, CLIENTS) as clients:
        for count in counts:
            yield _case("gRPC", count, bounds[count], _through_grpc(engine, clients, count))
    engine.close()


def _case(way: str, streams: int, step_ms: float, tokens_per_s: float) -> Case:
    return {
        "what": "served", "shape": SHAPE, "way": way, "streams": streams, "step_ms": round(step_ms, 3),
        "tokens_per_s": round(tokens_per_s), "busy_share": round(tokens_per_s * step_ms / 1e3 / streams, 3),
    }  # fmt: skip


def _step_ms(engine: CheckedEngine, rows: int, kinds: list[Kind]) -> float:
    plan = engine.plan(list(range(rows)), kinds, context=PROMPT + TOKENS // 2)
    return step_times(partial(engine.runner.execute, engine.batch.build(plan)))["step_ms"]


def _lease(engine: CheckedEngine, slot: int, kinds: list[Kind]) -> AdapterLease:
    generation = engine.parts.adapters.pool.generation(slot)
    return AdapterLease(str(slot), str(slot), slot, generation, width=kinds[slot][0] * kinds[slot][1], serial=0)


def _in_process(engine: CheckedEngine, rows: int, kinds: list[Kind]) -> float:
    """Tokens a second of steps in which all decode, every second row sampled by a seed."""
    inner = engine.parts.engine
    scheduler = inner.scheduler
    scheduler.roster._release_lease = lambda _: None  # noqa: SLF001  # the leases are not the manager's
    sequences = [_sequence(engine, number, _lease(engine, number, kinds)) for number in range(rows)]
    for sequence in sequences:
        scheduler.add(sequence)
    while any(not sequence.num_output for sequence in sequences):
        inner.step()
    before, started_s = sum(sequence.num_output for sequence in sequences), time.perf_counter()
    while not any(sequence.num_output >= TOKENS - 1 for sequence in sequences):
        inner.step()
    taken_s = time.perf_counter() - started_s
    tokens = sum(sequence.num_output for sequence in sequences) - before
    inner.finish()
    scheduler.abandon_all()
    return tokens / taken_s


def _through_grpc(engine: CheckedEngine, clients: Sequence[Worker], streams: int) -> float:
    """The same of streams of clients in other processes."""
    asked = [
        {"token_ids": _prompt(engine, number), "adapter": str(number), "max_tokens": TOKENS}
        for number in range(streams)
    ]  # fmt: skip
    answers = ask(clients, asked)
    if any(len(answer["tokens"]) != TOKENS for answer in answers):
        raise AssertionError("a stream ended early")
    return window(answers).tokens_per_s


def _sequence(engine: CheckedEngine, number: int, lease: AdapterLease) -> EngineSequence:
    sampling = GREEDY if number % 2 == 0 else SamplingParams(temperature=0.8, top_p=0.95)
    return make_sequence(
        f"check-{number}",
        _prompt(engine, number),
        lease,
        max_tokens=2 * TOKENS,
        vocab_size=engine.vocab_size,
        eos_token_ids=engine.parts.base.eos_token_ids,
        sampling=sampling,
        seed=number,
    )


def _prompt(engine: CheckedEngine, number: int) -> list[int]:
    found: list[int] = np.random.default_rng(number).integers(0, engine.vocab_size, PROMPT).tolist()
    return found


class _Service:
    """The real service on a thread of this process. `with` gives its address."""

    def __init__(self, engine: CheckedEngine, kinds: list[Kind]) -> None:
        self._engine, self._kinds = engine, kinds
        self._address: Future[str] = Future()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))

    def __enter__(self) -> str:
        self._thread.start()
        return self._address.result(60)

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._done.set)
        self._thread.join()

    async def _serve(self) -> None:
        from gralora_server.config import ServerConfig
        from gralora_server.service import GrpcServer

        self._loop, self._done = asyncio.get_running_loop(), asyncio.Event()
        adapters = Everybody(lambda name: _lease(self._engine, int(name), self._kinds))
        parts = replace(self._engine.parts, adapters=adapters)  # type: ignore[arg-type]
        sizes = {"max_num_seqs": parts.info.max_num_seqs, "max_num_batched_tokens": parts.info.max_num_batched_tokens}
        served = AsyncEngine(parts, EngineConfig(model=parts.info.model, **sizes))  # type: ignore[arg-type]
        server = GrpcServer(ServerConfig(port=0))
        port = await server.start()
        await server.open(served)
        self._address.set_result(f"127.0.0.1:{port}")
        await self._done.wait()
        await server.stop()
        await served.close()
