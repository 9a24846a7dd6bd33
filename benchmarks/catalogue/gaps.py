"""What cold adapters cost others, and those who ask for them: time between tokens, and time to the first one."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.catalogue.base import Base
from benchmarks.catalogue.gate import Gate, PartResult
from benchmarks.catalogue.plan import Plan
from benchmarks.host.streams import Answer, ask, clients_of
from benchmarks.worker import Worker
from gralora_server.client import Client
from gralora_server.loadtest.local_server import running
from gralora_server.loadtest.synthetic import AdapterKind, make_adapters

KIND = AdapterKind(r=16, k=2)
PROMPT_TOKENS = 16
POLL_S = 0.005
BUSY_OVER_QUIET, COLD_OVER_FLOOR = 1.10, 1.3
READS = 5  # of an adapter's file, of which the best counts: it is in the page cache


def gaps(base: Base, plan: Plan, folder: Path) -> PartResult:
    names = make_adapters(base.path, folder, [KIND], plan.streams + plan.cold + plan.cold_requests)
    resident, rest = names[: plan.streams], names[plan.streams :]
    cold, asked = rest[: plan.cold], rest[plan.cold :]
    num_bytes = _weights(folder / names[0]).stat().st_size
    pool_bytes = (len(names) + 1) * num_bytes
    with _serving(base, folder, pool_bytes) as (client, workers):
        firsts = [_first_tokens(client, base, folder, name) for name in asked]
        streams = Streams(client, workers, base, resident, plan.stream_tokens)
        for name in resident:
            client.adapters.load(name, pin=True)
        rounds = [_round(streams, cold) for _ in range(plan.rounds)]
    figures: dict[str, Any] = {
        "adapter_bytes": num_bytes,
        "streams": plan.streams,
        "cold": plan.cold,
        "quiet_p99_ms": [round(1e3 * quiet, 2) for quiet, _ in rounds],
        "busy_p99_ms": [round(1e3 * busy, 2) for _, busy in rounds],
        "first_tokens": firsts,
    }
    between = statistics.median(busy / quiet for quiet, busy in rounds)
    first = statistics.median(one["cold_over_floor"] for one in firsts)
    gates = [
        Gate("time between tokens, busy over quiet", between, BUSY_OVER_QUIET, is_speed=True),
        Gate("first token, cold over floor", first, COLD_OVER_FLOOR, is_speed=True),
    ]
    return PartResult(figures, gates)


@dataclass(frozen=True, slots=True)
class Streams:
    """Streams with resident adapters, and an operator beside them."""

    client: Client
    workers: Sequence[Worker]
    base: Base
    resident: Sequence[str]
    tokens: int

    def run(self, loaded: Sequence[str]) -> tuple[Sequence[Answer], float, float]:
        """What came, and the time that counts: that of the loads, or all of it."""
        asked = [
            {"token_ids": _prompt(self.base, number), "adapter": name, "max_tokens": self.tokens}
            for number, name in enumerate(self.resident)
        ]
        with ThreadPoolExecutor(1) as thread:
            answers = thread.submit(ask, self.workers, asked)
            while self.client.load().running < len(asked) and not answers.done():
                time.sleep(POLL_S)
            begin_s = time.perf_counter()
            for name in loaded:
                self.client.adapters.load(name)
            end_s = time.perf_counter() if loaded else float("inf")
            return answers.result(), begin_s, end_s


@contextmanager
def _serving(base: Base, folder: Path, pool_bytes: int) -> Iterator[tuple[Client, Sequence[Worker]]]:
    command = ["serve", "--model", str(base.path), "--adapters", str(folder), "--address", "127.0.0.1:0"]
    command += ["--adapter-pool-bytes", str(pool_bytes), "--kv-cache-bytes", "256MiB", "--no-prefix-cache"]
    command += ["--log-level", "error", "--device", "cpu"]
    with running(command) as server, Client(server.address) as client, clients_of(server.address, 1) as streams:
        yield client, streams


def _round(streams: Streams, cold: Sequence[str]) -> tuple[float, float]:
    """P99 of the time between tokens, quiet and while cold adapters load."""
    quiet, busy = (_p99(*streams.run(names)) for names in ((), cold))
    for name in cold:
        streams.client.adapters.unload(name)
    return quiet, busy


def _p99(answers: Sequence[Answer], begin_s: float, end_s: float) -> float:
    """Of gaps that have a part in the time that counts."""
    found = [
        after_s - before_s
        for answer in answers
        for before_s, after_s in zip(answer["times_s"], answer["times_s"][1:], strict=False)
        if after_s > begin_s and before_s < end_s
    ]
    return float(np.percentile(found, 99))


def _first_tokens(client: Client, base: Base, folder: Path, name: str) -> dict[str, float]:
    """Of an adapter that nobody asked for before, and then of the same."""
    read_s = _read_s(_weights(folder / name))
    cold_s = _first_token_s(client, base, name, 0)
    warm_s = statistics.median(_first_token_s(client, base, name, seed) for seed in (1, 2, 3))
    found = {"cold_ms": 1e3 * cold_s, "warm_ms": 1e3 * warm_s, "read_ms": 1e3 * read_s}
    return {key: round(value, 3) for key, value in (found | {"cold_over_floor": cold_s / (warm_s + read_s)}).items()}


def _first_token_s(client: Client, base: Base, name: str, seed: int) -> float:
    with client.stream(
        token_ids=_prompt(base, seed), adapter=name, temperature=0.0, max_tokens=2, ignore_eos=True
    ) as stream:
        ttft_s = stream.read().ttft_s
    assert ttft_s is not None
    return ttft_s


def _read_s(file: Path) -> float:
    times_s = []
    for _ in range(READS):
        begin_s = time.perf_counter()
        file.read_bytes()
        times_s.append(time.perf_counter() - begin_s)
    return min(times_s)


def _weights(directory: Path) -> Path:
    return directory / "adapter_model.safetensors"


def _prompt(base: Base, seed: int) -> list[int]:
    drawn = random.Random(seed)
    return [drawn.randrange(3, base.vocab_size) for _ in range(PROMPT_TOKENS)]
