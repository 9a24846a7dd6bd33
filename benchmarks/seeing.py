"""`python -m benchmarks.seeing`: what it costs to explain, log, trace and show requests, and how well it explains them.

On: timelines kept, a JSON line a request, spans of every request sent to a collector, and the live page with a reader;
collector and reader are in the same process, whose time counts, too. Off: the same engine with marks that are not made,
no lines, no spans and no page. Both behind a server of gRPC, by turns. Tokens are compared before a time is kept.

Then a mixed load on another engine, with so little memory that requests give way and adapters leave the pool: how far
the parts of an explanation are from what the request's client, a process of its own, measured.

Writes JSON; fails if a gate does.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import statistics
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from benchmarks.catalogue.gate import Gate, show
from benchmarks.machine import busy_share, facts
from benchmarks.measurement import Answer, Contender, Run, SameTokens, interleave, ratio
from benchmarks.onlooker import looking
from benchmarks.workload import FULL, QUICK, Request, Workload, make_prompts, make_requests
from gralora_runtime.async_engine import AsyncEngine
from gralora_runtime.config import EngineConfig, in_directory
from gralora_runtime.observation.holdups import Hold, Holdups
from gralora_runtime.observation.step_log import StepLog
from gralora_runtime.observation.timelines import Timelines
from gralora_runtime.plan import StepPlan
from gralora_runtime.scheduling.marking import Marking
from gralora_server.cli.logs import AsJson
from gralora_server.client import AsyncClient, Explanation
from gralora_server.config import HttpConfig, ServerConfig, TracingConfig
from gralora_server.live.page import LivePage
from gralora_server.model_fetch import ensure_default_model
from gralora_server.service import GrpcServer, sparing_collector

ON, OFF = "explained, logged, traced and shown", "nothing of it"
OUT = Path(__file__).parent / "results" / "seeing.json"
ADAPTERS = Path(__file__).parent.parent / "examples" / "adapters"
CALLS = logging.getLogger("gralora_server.calls")
MIXED = 200
FLOOD = 4  # one of so many
EVERY_S = 1.0  # a page in a browser
UI = HttpConfig(host="127.0.0.1", port=0)
LEAST_THROUGHPUT, MOST_P99 = 0.98, 1.03  # of what it is without
PARTS_WITHIN = 0.02  # of what clients measure
KV_BYTES = 24 << 20  # so little that some of eight requests give way


class NoSteps(StepLog):
    """Of an engine that nobody asks."""

    def note(self, plan: StepPlan, began_s: float, ended_s: float) -> None:
        pass


class NoHoldups(Holdups):
    """As above."""

    def note(self, hold: Hold | None, now_s: float) -> None:
        pass


def _nothing(*_: object) -> None:
    pass


def unmarked(marking: Marking) -> Marking:
    """One that is called and writes nothing down."""
    made = Marking(marking._ledger, time.monotonic)  # noqa: SLF001  # what no setting switches off
    made.steps, made.holdups = NoSteps(), NoHoldups()
    for name in ("queued", "gave_way", "resumed", "paused", "started", "computed", "decodes", "ended"):
        setattr(made, name, _nothing)
    return made


class Collector(trace_service_pb2_grpc.TraceServiceServicer):  # type: ignore[misc]  # generated, and untyped
    """Takes spans, and counts them."""

    def __init__(self) -> None:
        self.spans = 0

    def Export(self, request: Any, _context: Any) -> Any:
        self.spans += sum(len(scope.spans) for resource in request.resource_spans for scope in resource.scope_spans)
        return trace_service_pb2.ExportTraceServiceResponse()


@contextmanager
def collecting() -> Iterator[tuple[Collector, str]]:
    collector, server = Collector(), grpc.server(ThreadPoolExecutor(1))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield collector, f"http://127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


class Served:
    """One engine behind two servers, on one event loop, which runs while requests do."""

    def __init__(self, config: EngineConfig, endpoint: str) -> None:
        self._loop = asyncio.Runner()
        with sparing_collector():  # as the server does
            self.engine = self._loop.run(AsyncEngine.start(config))
        self._scheduler = self.engine._parts.engine.scheduler  # noqa: SLF001
        self._markings = {True: self._scheduler.marking, False: unmarked(self._scheduler.marking)}
        self._rings = {True: self.engine.timelines, False: Timelines(0)}
        self.looks: list[float] = []  # seconds that each of the reader's took
        self._servers, self._addresses, self._clients = {}, {}, {}
        for seen, tracing in ((True, TracingConfig(endpoint=endpoint)), (False, None)):
            self._servers[seen], self._addresses[seen] = self._loop.run(self._serve(tracing))
            self._clients[seen] = self._loop.run(_connected(self._addresses[seen]))

    async def _serve(self, tracing: TracingConfig | None) -> tuple[GrpcServer, str]:
        server = GrpcServer(ServerConfig(port=0, tracing=tracing))
        port = await server.start()
        await server.open(self.engine)
        return server, f"127.0.0.1:{port}"

    def run(self, requests: Sequence[Request], *, seen: bool) -> Run:
        """All of them arrive together."""
        self._scheduler.marking = self._markings[seen]
        self._scheduler.roster._ended = self._scheduler.marking.ended  # noqa: SLF001
        self.engine.timelines = self._rings[seen]
        CALLS.setLevel(logging.INFO if seen else logging.WARNING)
        with self._shown() if seen else nullcontext():
            return self._loop.run(self._generate(requests, self._clients[seen]))

    @contextmanager
    def _shown(self) -> Iterator[None]:
        """Like `gralora serve --ui-address`, and a browser that looks."""
        page = LivePage(UI, ServerConfig(), self._servers[True])
        url = f"http://127.0.0.1:{page.port}/now?after="
        after_s = 0.0

        def look() -> None:
            nonlocal after_s
            with urllib.request.urlopen(f"{url}{after_s}", timeout=10) as answer:
                after_s = max(json.load(answer)["history"]["at_s"], default=after_s)

        try:
            with looking(look, every_s=EVERY_S) as taken_s:
                yield
            self.looks += taken_s
        finally:
            page.close()

    def explained(self, num_requests: int, names: Sequence[str]) -> list[tuple[float, Explanation]]:
        """Of each request of a mixed load, what its client measured, in seconds, and what it was told."""
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            return self._loop.run(self._asked_in(pool, num_requests, names))

    def close(self) -> None:
        for seen in (True, False):
            self._loop.run(self._clients[seen].close())
            self._loop.run(self._servers[seen].stop())
        self._loop.run(self.engine.close())
        self._loop.close()

    async def _asked_in(
        self, pool: ProcessPoolExecutor, num_requests: int, names: Sequence[str]
    ) -> list[tuple[float, Explanation]]:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(pool, ask_all, self._addresses[True], num_requests, names)

    async def _generate(self, requests: Sequence[Request], client: AsyncClient) -> Run:
        started_s = time.perf_counter()
        return Run(tuple(await asyncio.gather(*(_one(request, client, started_s) for request in requests))))


async def _connected(address: str) -> AsyncClient:
    return AsyncClient(address)


def ask_all(address: str, num_requests: int, names: Sequence[str]) -> list[tuple[float, Explanation]]:
    """By a client in a process of its own, as clients are."""
    return asyncio.run(_mixed(address, num_requests, names))


async def _mixed(address: str, num_requests: int, names: Sequence[str]) -> list[tuple[float, Explanation]]:
    """A part of them comes at once, for one adapter; the others one after another, for all."""
    found = []
    async with AsyncClient(address) as client:
        await client.info()  # connects

        async def ask(at: int) -> tuple[str, float]:
            is_flood = at < num_requests // FLOOD
            await asyncio.sleep(0.0 if is_flood else 0.02 * at)
            began_s = time.perf_counter()
            prompt = [5 + (at * 7 + place) % 290 for place in range(8 + at % 70)]
            answer = await client.generate(
                token_ids=prompt,
                adapter=names[-1 if is_flood else at % len(names)],
                max_tokens=8 + at % 24,
                ignore_eos=True,
            )
            return answer.request_id, time.perf_counter() - began_s

        for request_id, measured_s in await asyncio.gather(*(ask(at) for at in range(num_requests))):
            told = await client.explain(request_id)
            assert told is not None
            found.append((measured_s, told))
    return found


async def _one(request: Request, client: AsyncClient, started_s: float) -> Answer:
    options: dict[str, Any] = {"max_tokens": request.max_tokens, "temperature": 0.0, "ignore_eos": True}
    tokens: list[int] = []
    times_s: list[float] = []
    async for delta in client.stream(token_ids=request.prompt, adapter=request.adapter, **options):
        tokens += delta.token_ids
        times_s += [time.perf_counter() - started_s] * len(delta.token_ids)
    return Answer(request, tuple(tokens), tuple(times_s))


def cost(model_dir: Path, workload: Workload, rounds: int) -> dict[str, Any]:
    """On and off in turn; the ratio of a round is of two runs that followed each other."""
    config = EngineConfig(model=model_dir, max_num_seqs=workload.crowd, enable_prefix_cache=False)
    with collecting() as (collector, endpoint), logged():
        served = Served(config, endpoint)
        try:
            vocab_size = served.engine.info().vocab_size
            prompts = make_prompts(workload.crowd, workload.prompt_tokens, vocab_size)
            requests = make_requests(prompts, [""], workload.output_tokens)
            contenders = [
                Contender(name=name, run=lambda _, seen=seen: [served.run(requests, seen=seen)])  # type: ignore[misc]
                for name, seen in ((ON, True), (OFF, False))
            ]
            measured = interleave(contenders, rounds, check=SameTokens("looking on").check)
        finally:
            served.close()
    rates = {name: [_rate(run) for (run,) in runs] for name, runs in measured.items()}
    gaps = {name: [_p99_gap(run) for (run,) in runs] for name, runs in measured.items()}
    return {
        "tokens_per_s": rates,
        "p99_between_tokens_s": gaps,
        "throughput_on_over_off": ratio(rates[ON], rates[OFF]),
        "p99_on_over_off": ratio(gaps[ON], gaps[OFF]),
        "spans": collector.spans,
        "page": {"looks": len(served.looks), "median_s": statistics.median(served.looks)},
    }


def explained(model_dir: Path, adapters: Path, num_requests: int) -> dict[str, Any]:
    """Of a mixed load with a flood, preemptions and cold adapters. Every adapter is a tenant of its own."""
    sizes: dict[str, Any] = {"max_num_seqs": 8, "max_model_len": 128, "max_adapter_slots": 2}
    sizes["num_threads"] = max(1, len(os.sched_getaffinity(0)) - 1)  # clients compute elsewhere, as a rule
    config = EngineConfig(model=model_dir, adapters=in_directory(adapters), kv_cache_bytes=KV_BYTES, **sizes)
    with collecting() as (_, endpoint), logged():
        served = Served(config, endpoint)
        try:
            names = ["", *(info.name for info in served.engine.adapters.list())]
            told = served.explained(num_requests, names)
            preemptions = served.engine.load().preemptions
        finally:
            served.close()
    off = [abs(1 - sum(part.duration_s for part in found.parts) / measured_s) for measured_s, found in told]
    measured = [measured_s for measured_s, _ in told]
    return {
        "requests": num_requests,
        "preemptions": preemptions,
        "causes": dict(Counter(found.cause for _, found in told).most_common()),
        "measured_s": {"median": statistics.median(measured), "max": max(measured)},
        "parts_off_by": {"median": statistics.median(off), "p95": sorted(off)[int(0.95 * len(off))], "max": max(off)},
        "within_2_percent": sum(one <= PARTS_WITHIN for one in off) / len(off),
    }


def judge(found: dict[str, Any]) -> list[Gate]:
    cost, parts = found["cost"], found["explained"]
    slower = 1 / cost["throughput_on_over_off"]["median"]
    return [
        Gate("throughput without, over that with everything on", slower, 1 / LEAST_THROUGHPUT, is_speed=True),
        Gate("P99 between tokens, over that without", cost["p99_on_over_off"]["median"], MOST_P99, is_speed=True),
        Gate("parts off by, 95 % of the requests", parts["parts_off_by"]["p95"], PARTS_WITHIN, is_speed=True),
    ]


@contextmanager
def logged() -> Iterator[None]:
    """Lines are made and written, to nowhere."""
    with Path(os.devnull).open("w") as nowhere:
        handler = logging.StreamHandler(nowhere)
        handler.setFormatter(AsJson())
        CALLS.addHandler(handler)
        try:
            yield
        finally:
            CALLS.removeHandler(handler)


def _rate(run: Run) -> float:
    return sum(len(answer.tokens) for answer in run.answers) / run.total_s


def _p99_gap(run: Run) -> float:
    gaps = sorted(
        later - sooner
        for answer in run.answers
        for sooner, later in zip(answer.times_s, answer.times_s[1:], strict=False)
    )
    return gaps[int(0.99 * len(gaps))]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="default: SmolLM2-135M-Instruct, prepared once")
    parser.add_argument("--adapters", type=Path, default=ADAPTERS, help="for the mixed load")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="as little of it as there can be")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    model, workload = options.model or ensure_default_model(), QUICK if options.quick else FULL
    busy = busy_share()
    result: dict[str, Any] = {
        "cost": cost(model, workload, 1 if options.quick else options.rounds),
        "explained": explained(model, options.adapters, 8 if options.quick else MIXED),
        "workload": {"requests": workload.crowd, "output_tokens": workload.output_tokens, "quick": options.quick},
        "machine": facts() | {"busy_share_before": busy, "busy_share_after": busy_share()},
    }
    gates = judge(result)
    result["gates"] = [asdict(gate) | {"passed": gate.passed} for gate in gates]
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    show(gates)
    sys.exit(not options.quick and any(not gate.passed for gate in gates))


if __name__ == "__main__":
    main()
