"""The engine around the GPU's steps: pipelined, with sampling; in process, and behind gRPC with clients elsewhere.

How busy the GPU is: what its steps take alone, by `step_ms` of the same engine, over the time in which they were done.
"""

from __future__ import annotations

import asyncio
import importlib.util
import itertools
import os
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from benchmarks.gpu_check.clock import step_times
from benchmarks.gpu_check.engines import CheckedEngine, Kind
from benchmarks.gpu_check.speed import DTYPE, ON_GPU, engine_sizes
from benchmarks.worker import Worker
from gralora_runtime.adapters.lease import BASE_LEASE, AdapterLease
from gralora_runtime.async_engine import AsyncEngine
from gralora_runtime.config import EngineConfig
from gralora_runtime.request import ResponseParams, SamplingParams, StoppingParams
from gralora_runtime.sampling.state import SamplerState
from gralora_runtime.sequence import Sequence as EngineSequence

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
    with _Service(engine, kinds) as ask:
        for count in counts:
            yield _case("gRPC", count, bounds[count], ask(count))
    engine.close()


def _case(way: str, streams: int, step_ms: float, tokens_per_s: float) -> Case:
    return {
        "what": "served", "shape": SHAPE, "way": way, "streams": streams, "step_ms": round(step_ms, 3),
        "tokens_per_s": round(tokens_per_s), "busy_share": round(tokens_per_s * step_ms / 1e3 / streams, 3),
    }  # fmt: skip


def _step_ms(engine: CheckedEngine, rows: int, kinds: list[Kind]) -> float:
    plan = engine.plan(list(range(rows)), kinds, context=PROMPT + TOKENS // 2)
    return step_times(partial(engine.runner.execute, engine.batch.build(plan)))["step_ms"]


_serials = itertools.count(1)


def _lease(engine: CheckedEngine, slot: int, kinds: list[Kind]) -> AdapterLease:
    generation = engine.parts.adapters.pool.generation(slot)
    return AdapterLease(str(slot), str(slot), slot, generation, width=kinds[slot][0] * kinds[slot][1], serial=0)


def _in_process(engine: CheckedEngine, rows: int, kinds: list[Kind]) -> float:
    """Tokens a second of steps in which all decode, every second row sampled by a seed."""
    inner = engine.parts.engine
    scheduler = inner.scheduler
    scheduler._release_lease = lambda _: None  # noqa: SLF001  # the leases are not the manager's
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


def _sequence(engine: CheckedEngine, number: int, lease: AdapterLease) -> EngineSequence:
    prompt = np.random.default_rng(number).integers(0, engine.vocab_size, PROMPT).tolist()
    sampling = SamplingParams(temperature=0.0) if number % 2 == 0 else SamplingParams(temperature=0.8, top_p=0.95)
    stopping = StoppingParams(ignore_eos=True)
    return EngineSequence(
        request_id=f"check-{next(_serials)}", adapter_name=lease.name, tokens=prompt, num_prompt=PROMPT,
        max_tokens=2 * TOKENS, stopping=stopping, eos_token_ids=frozenset({1}), lease=lease,
        sampler=SamplerState(
            sampling, stopping, ResponseParams(), seed=number, prompt_token_ids=prompt, eos_token_ids=(1,),
            vocab_size=engine.vocab_size,
        ),
        detokenizer=None, arrival_s=time.monotonic(), seed=number,
    )  # fmt: skip


class _Filled:
    """In the place of the adapters' manager: slots that were filled, named by their numbers."""

    def __init__(self, engine: CheckedEngine, kinds: list[Kind]) -> None:
        self._engine, self._kinds = engine, kinds

    def acquire(self, name: str) -> Future[AdapterLease]:
        future: Future[AdapterLease] = Future()
        future.set_result(_lease(self._engine, int(name), self._kinds) if name else BASE_LEASE)
        return future

    def abandon(self, acquired: Future[AdapterLease]) -> None:
        """Nothing was taken."""

    def close(self) -> None:
        """The engine's own manager is closed by whoever made it."""


class _Service:
    """The real service on a thread of this process. `with` gives what asks it for streams and says tokens a second."""

    def __init__(self, engine: CheckedEngine, kinds: list[Kind]) -> None:
        self._engine, self._kinds = engine, kinds
        self._address: Future[str] = Future()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))

    def __enter__(self) -> Any:
        self._thread.start()
        address = self._address.result(60)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-m", "benchmarks.host.client", address]
        self._clients = [Worker(command, environment=environment) for _ in range(CLIENTS)]
        return self._ask

    def __exit__(self, *_: object) -> None:
        for client in self._clients:
            client.__exit__(None, None, None)
        self._loop.call_soon_threadsafe(self._done.set)
        self._thread.join()

    def _ask(self, streams: int) -> Any:
        asked = [
            {
                "token_ids": np.random.default_rng(number).integers(0, self._engine.vocab_size, PROMPT).tolist(),
                "adapter": str(number),
                "max_tokens": TOKENS,
            }
            for number in range(streams)
        ]
        with ThreadPoolExecutor(CLIENTS) as threads:
            parts = list(
                threads.map(lambda n: self._clients[n].ask({"streams": asked[n::CLIENTS]})["streams"], range(CLIENTS))
            )
        answers = [answer for part in parts for answer in part]
        if any(len(answer["tokens"]) != TOKENS for answer in answers):
            raise AssertionError("a stream ended early")
        begin_s = max(answer["times_s"][0] for answer in answers)
        end_s = min(answer["times_s"][-1] for answer in answers)
        tokens = sum(
            count
            for answer in answers
            for time_s, count in zip(answer["times_s"], answer["counts"], strict=True)
            if begin_s < time_s <= end_s
        )
        return tokens / (end_s - begin_s)

    async def _serve(self) -> None:
        from gralora_server.config import ServerConfig
        from gralora_server.service import GrpcServer

        self._loop, self._done = asyncio.get_running_loop(), asyncio.Event()
        parts = replace(self._engine.parts, adapters=_Filled(self._engine, self._kinds))  # type: ignore[arg-type]
        sizes = {"max_num_seqs": parts.info.max_num_seqs, "max_num_batched_tokens": parts.info.max_num_batched_tokens}
        served = AsyncEngine(parts, EngineConfig(model=parts.info.model, **sizes))  # type: ignore[arg-type]
        server = GrpcServer(ServerConfig(port=0))
        port = await server.start()
        await server.open(served)
        self._address.set_result(f"127.0.0.1:{port}")
        await self._done.wait()
        await server.stop()
        await served.close()
