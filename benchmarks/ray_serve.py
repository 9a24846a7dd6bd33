"""`python -m benchmarks.ray_serve`: two replicas on Ray Serve, sixteen adapters, beside servers of our own.

Do requests for an adapter stay where it is, does each replica have its share of them, what do clients see when one is
killed under load, and what do Serve's proxies cost. Every answer is compared with what a server of our own answers to
that request alone. The client is on the same cores. Writes JSON; fails if a gate does.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import grpc
import psutil
from google.rpc import error_details_pb2  # type: ignore[import-untyped]
from grpc_status import rpc_status
from rich.console import Console
from rich.table import Table

from benchmarks.catalogue.gate import Gate, show
from benchmarks.machine import busy_share, facts
from gralora.v1 import generation_pb2, generation_pb2_grpc
from gralora_server.loadtest.local_server import running
from gralora_server.loadtest.synthetic import AdapterKind, make_adapters
from gralora_server.model_fetch import ensure_default_model
from gralora_server.ray.context import REPLICA_KEY
from gralora_server.ray.homes import most

RESULTS = Path(__file__).parent / "results"
SCRIPT = Path(__file__).parent.parent / "scripts" / "ray_local.py"
REPLICA_TITLE = "ServeReplica:"  # somewhere in what Ray calls a replica's process
ROUNDS = 3
LEAST_AT_HOME = 0.9
RESUMED_S = 60.0
GIVE_UP_S = 180.0
FIRST, LATER, RATE = "first token", "later token", "tokens/s"
# Of the direct servers and the replicas alike.
CONFIG = """\
[engine]
model = "{model}"
prefix_cache = false
[memory]
kv_cache_bytes = "512MiB"
adapter_pool_bytes = "512MiB"
[adapters]
sources = ["{adapters}"]
[server]
log_level = "error"
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    adapters: int = 16
    prompt_tokens: int = 64
    output_tokens: int = 64
    long_tokens: int = 256  # of streams that are under way when a replica is killed
    alone: int = 5  # streams one after the other


FULL, QUICK = Size(), Size(adapters=4, prompt_tokens=8, output_tokens=8, long_tokens=32, alone=2)


@dataclass(frozen=True, slots=True)
class Told:
    """What a client saw of one stream. `reason` "": it ended well."""

    adapter: str
    tokens: list[int] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)  # since it was asked for; one for each token
    replica: str = ""
    code: str = "OK"
    reason: str = ""


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.ray_serve", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a minute of it; judges no speed")
    parser.add_argument("--json", type=Path, default=RESULTS / "ray_serve.json", help="where to write the result")
    options = parser.parse_args()
    options.json.parent.mkdir(parents=True, exist_ok=True)
    size = QUICK if options.quick else FULL
    result: dict[str, Any] = {"machine": facts(), "busy_share_before": busy_share(), "size": asdict(size)}
    with tempfile.TemporaryDirectory(prefix="ray-serve-") as folder:
        figures = measure(ensure_default_model(), Path(folder), size)
    gates = judge(figures, size)
    result |= {"figures": figures, "gates": [asdict(gate) | {"passed": gate.passed} for gate in gates]}
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    show_cost(figures)
    show(gates)
    sys.exit(any(not gate.passed and not (options.quick and gate.is_speed) for gate in gates))


def measure(model: Path, folder: Path, size: Size) -> dict[str, Any]:
    """The direct servers first: what they answer is what replicas have to."""
    names = make_adapters(model, folder / "adapters", [AdapterKind(16, 2)], size.adapters)
    config = folder / "gralora.toml"
    config.write_text(CONFIG.format(model=model, adapters=folder / "adapters"))
    with direct(config, threads=1) as address:
        expected = asyncio.run(each_alone(address, names, size, size.long_tokens))
        of_one = asyncio.run(one_stream(address, names, size))
    with direct(config, threads=2) as address:
        of_direct = asyncio.run(crowds(address, names, size))
    with replicas(config) as (address, process):
        on_ray = asyncio.run(one_stream(address, names, size))
        rounds = asyncio.run(crowds(address, names, size))
        killed = asyncio.run(with_a_kill(address, process, names, size))
    wrong = [
        one for told in (*of_direct, *rounds, killed.under_way, killed.after) for one in told if odd(one, expected)
    ]
    found = {
        "one_stream_s": {"direct": by_token(of_one), "ray": by_token(on_ray)},
        "tokens_per_s": {"direct": [rate(one) for one in of_direct], "ray": [rate(one) for one in rounds]},
    }
    return found | {
        "cost": cost(found),
        "at_home": at_home(rounds),
        "replicas": dict(Counter(one.replica for told in rounds for one in told)),
        "ends_under_way": dict(Counter(f"{one.code} {one.reason}".strip() for one in killed.under_way)),
        "resumed_s": killed.resumed_s,
        "wrong": [asdict(one) for one in wrong],
    }


def cost(found: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Medians, and how many times as much it is with Serve as without."""
    kinds = {RATE: found["tokens_per_s"]}
    for name in (FIRST, LATER):
        kinds[name] = {way: times_s[name] for way, times_s in found["one_stream_s"].items()}
    medians = {name: {way: statistics.median(all_of) for way, all_of in kind.items()} for name, kind in kinds.items()}
    return {name: kind | {"ratio": kind["ray"] / kind["direct"]} for name, kind in medians.items()}


def show_cost(figures: dict[str, Any]) -> None:
    table = Table("median", "direct", "Ray Serve", "ratio")
    for name, unit, scale in ((FIRST, "ms", 1000), (LATER, "ms", 1000), (RATE, "", 1)):
        of = figures["cost"][name]
        table.add_row(
            f"{name} {unit}".strip(), f"{scale * of['direct']:.1f}", f"{scale * of['ray']:.1f}", f"{of['ratio']:.2f}"
        )
    Console(width=120).print(table)


def judge(figures: dict[str, Any], size: Size) -> list[Gate]:
    served = figures["replicas"].values()
    fair = min(most(size.adapters, 2) / size.adapters, 1.0)  # of a round, whose requests are all there at once
    ends = figures["ends_under_way"]
    strange = sum(count for end, count in ends.items() if end not in ("OK", "UNAVAILABLE REPLICA_LOST"))
    cut = ends.get("UNAVAILABLE REPLICA_LOST", 0)
    return [
        Gate("share of requests on a replica without their adapter", 1 - figures["at_home"], 1 - LEAST_AT_HOME),
        Gate("largest share of requests on one replica", max(served) / sum(served), fair),
        Gate("wrong answers", len(figures["wrong"]), 0),
        Gate("streams of a killed replica that end otherwise than UNAVAILABLE", strange, 0),
        Gate("kills that met no stream", int(cut == 0), 0),
        Gate("seconds until all adapters are served again", figures["resumed_s"], RESUMED_S, is_speed=True),
    ]


@contextmanager
def direct(config: Path, *, threads: int) -> Iterator[str]:
    with running(["serve", "--config", str(config), "--address", "127.0.0.1:0", "--threads", str(threads)]) as server:
        yield server.address


@contextmanager
def replicas(config: Path) -> Iterator[tuple[str, psutil.Process]]:
    """Two, with a core each, and the process that all of them are below."""
    command = [sys.executable, str(SCRIPT), "--json", "--grpc-port", "0", "--http-port", "0", "--config", str(config)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = next(line for line in process.stdout if line.startswith("{"))  # Ray says things of its own
            yield json.loads(line)["grpc"], psutil.Process(process.pid)
        finally:
            process.terminate()
            process.wait(60)


async def each_alone(address: str, names: Sequence[str], size: Size, max_tokens: int) -> dict[str, list[int]]:
    async with grpc.aio.insecure_channel(address) as channel:
        return {name: (await stream(channel, name, size, max_tokens)).tokens for name in names}


async def one_stream(address: str, names: Sequence[str], size: Size) -> list[Told]:
    """One after the other, each adapter having been served before."""
    async with grpc.aio.insecure_channel(address) as channel:
        await stream(channel, names[0], size, size.output_tokens)
        return [await stream(channel, names[0], size, size.output_tokens) for _ in range(size.alone)]


async def crowds(address: str, names: Sequence[str], size: Size) -> list[list[Told]]:
    """A request for each adapter at the same time, in rounds."""
    async with grpc.aio.insecure_channel(address) as channel:
        return [await crowd(channel, names, size, size.output_tokens) for _ in range(ROUNDS)]


@dataclass(frozen=True, slots=True)
class Killed:
    under_way: list[Told]
    after: list[Told]
    resumed_s: float


async def with_a_kill(address: str, process: psutil.Process, names: Sequence[str], size: Size) -> Killed:
    async with grpc.aio.insecure_channel(address) as channel:
        begun = asyncio.Semaphore(0)
        streams = [asyncio.create_task(stream(channel, name, size, size.long_tokens, begun)) for name in names]
        for _ in names:
            await begun.acquire()
        victim = next(child for child in process.children(recursive=True) if is_replica(child))
        victim.kill()
        killed_s = time.perf_counter()
        under_way = list(await asyncio.gather(*streams))
        while True:
            after = await crowd(channel, names, size, size.output_tokens)
            resumed_s = time.perf_counter() - killed_s
            if all(not one.reason and one.code == "OK" for one in after) or resumed_s > GIVE_UP_S:
                return Killed(under_way, after, resumed_s)


def is_replica(process: psutil.Process) -> bool:
    try:
        return REPLICA_TITLE in " ".join(process.cmdline())
    except psutil.Error:
        return False


async def crowd(channel: grpc.aio.Channel, names: Sequence[str], size: Size, max_tokens: int) -> list[Told]:
    return list(await asyncio.gather(*(stream(channel, name, size, max_tokens) for name in names)))


async def stream(
    channel: grpc.aio.Channel, adapter: str, size: Size, max_tokens: int, begun: asyncio.Semaphore | None = None
) -> Told:
    """One request, greedily, to its end. `begun` is released when its first token is there, or it has ended."""
    stub: Any = generation_pb2_grpc.GenerationServiceStub(channel)
    request = generation_pb2.StreamGenerateRequest(
        adapter=adapter,
        token_ids=generation_pb2.TokenIds(ids=range(100, 100 + size.prompt_tokens)),
        sampling=generation_pb2.SamplingParams(temperature=0.0),
        stopping=generation_pb2.StoppingParams(max_tokens=max_tokens, ignore_eos=True),
    )
    tokens: list[int] = []
    times_s: list[float] = []
    started_s = time.perf_counter()
    call = stub.StreamGenerate(request, timeout=GIVE_UP_S)
    try:
        async for message in call:
            times_s += [time.perf_counter() - started_s] * len(message.token_ids)
            tokens += message.token_ids
            if begun is not None and tokens:
                begun.release()
                begun = None
    except grpc.aio.AioRpcError as error:
        return Told(adapter, tokens, times_s, code=error.code().name, reason=reason_of(error))
    finally:
        if begun is not None:
            begun.release()
    trailers = dict(await call.trailing_metadata())
    return Told(adapter, tokens, times_s, replica=str(trailers.get(REPLICA_KEY, "")))


def reason_of(error: Any) -> str:
    """Of a status that a server of ours set."""
    status = rpc_status.from_call(error)
    info = error_details_pb2.ErrorInfo()
    return str(info.reason) if status is not None and any(one.Unpack(info) for one in status.details) else ""


def odd(told: Told, expected: dict[str, list[int]]) -> bool:
    """Of a stream that was cut off, as far as it came."""
    return told.tokens != expected[told.adapter][: len(told.tokens)] or (told.code == "OK" and not told.tokens)


def at_home(rounds: Sequence[Sequence[Told]]) -> float:
    """The share of the rounds after the first that were served where their adapter had been before."""
    homes: dict[str, set[str]] = {}
    found = []
    for number, told in enumerate(rounds):
        if number:
            found += [one.replica in homes[one.adapter] for one in told]
        for one in told:
            homes.setdefault(one.adapter, set()).add(one.replica)
    return statistics.mean(found)


def by_token(told: Sequence[Told]) -> dict[str, list[float]]:
    return {
        FIRST: [one.times_s[0] for one in told],
        LATER: [(one.times_s[-1] - one.times_s[0]) / (len(one.times_s) - 1) for one in told],
    }


def rate(told: Sequence[Told]) -> float:
    """Tokens a second of all streams together."""
    return sum(len(one.tokens) for one in told) / max(one.times_s[-1] for one in told)


if __name__ == "__main__":
    main()
