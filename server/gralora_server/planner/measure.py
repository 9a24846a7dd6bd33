"""Measures a profile: a server of its own is sent waves of requests that differ in one thing at a time."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import cycle, islice
from pathlib import Path
from statistics import median

from gralora_server.client import AsyncClient
from gralora_server.client.connection import Connection
from gralora_server.loadtest.local_server import LocalServer, running
from gralora_server.loadtest.machine import facts
from gralora_server.loadtest.run import Target
from gralora_server.planner.points import CROWD, LONG, SHORT, Point, Points
from gralora_server.planner.profile import Profile
from gralora_server.planner.waves import Waves

ROUNDS = 3
DECODED = 24  # tokens of each request of a wave
# While adapters are loaded, so many requests run; without them the same again.
LOADED_OUTPUT = 160
OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What is measured: a model under a server's settings, with adapters of the mix that is planned for."""

    model: Path
    adapters: Path
    adapter_bytes: Mapping[str, int]  # in the pool, by name; no more than one step may have
    described: str  # the adapters
    settings: Mapping[str, int]  # max_num_seqs, max_num_batched_tokens, page_size
    kv_token_bytes: int
    environment: Mapping[str, str]

    def arguments(self) -> list[str]:
        """Of `gralora serve`, with room for every wave and all adapters."""
        tokens = self.settings["max_num_seqs"] * 2 * (LONG + LOADED_OUTPUT)
        sizes = self.adapter_bytes.values()
        arguments = ["serve", "--address", "127.0.0.1:0", "--log-level", "error", "--no-prefix-cache"]
        arguments += ["--model", str(self.model), "--adapters", str(self.adapters)]
        arguments += [part for name, value in self.settings.items() for part in (option(name), str(value))]
        arguments += ["--kv-cache-bytes", str(tokens * self.kv_token_bytes)]
        return [*arguments, "--adapter-pool-bytes", str(sum(sizes) + max(sizes))]


def option(name: str) -> str:
    """Of `gralora serve`."""
    return f"--{name.replace('_', '-')}"


def measure(subject: Subject, on_progress: OnProgress = lambda *_: None) -> Profile:
    """A minute or two. Raises ConfigError if the server cannot be measured, a GraloraClientError if it dies."""
    with running(subject.arguments(), subject.environment) as server:
        return asyncio.run(_profile(subject, server, on_progress))


async def _profile(subject: Subject, server: LocalServer, on_progress: OnProgress) -> Profile:
    names, sizes = list(subject.adapter_bytes), list(subject.adapter_bytes.values())
    async with AsyncClient(server.address) as client:
        await client.wait_ready()
        info = await client.info()
        waves = Waves(Target.at(Connection(target=server.address)).connection, info.vocab_size, info.max_model_len)
        await waves.step_s([""], DECODED)
        server_bytes = server.memory_bytes
        assert server_bytes is not None  # it has just answered
        points = Points(
            info.max_num_seqs, info.max_num_batched_tokens, min(LONG, info.max_model_len - DECODED - LOADED_OUTPUT)
        )
        await waves.send(names, SHORT, DECODED)  # loads them
        times_s = await _times_s(points.all(), waves, names, info.max_num_batched_tokens, on_progress)
        on_progress("measuring loads", 0, 1)
        load_byte_s, slowdown = await _loading(client, waves, subject.adapter_bytes, info.max_num_seqs)
    costs = points.costs(times_s, sizes)
    return Profile(
        model=subject.model.name,
        made_at=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=facts(),
        settings=subject.settings,
        adapters=subject.described,
        **{name: getattr(costs, name) for name in costs.__slots__},
        load_byte_s=load_byte_s,
        load_slowdown=slowdown,
        server_bytes=server_bytes,
        kv_token_bytes=subject.kv_token_bytes,
    )


async def _times_s(
    points: Sequence[Point],
    waves: Waves,
    names: Sequence[str],
    max_num_batched_tokens: int,
    on_progress: OnProgress,
) -> dict[Point, float]:
    """Medians of several rounds through all points, so that a slow minute of the machine does not hit one only."""
    times_s: dict[Point, list[float]] = defaultdict(list)
    for done in range(ROUNDS * len(points)):
        on_progress("measuring steps", done, ROUNDS * len(points))
        point = points[done % len(points)]
        adapters = list(islice(cycle(names if point.adapted else [""]), point.rows))
        if point.first:
            times_s[point].append(await waves.first_s(adapters[0], point.prompt))
        else:
            # Prompts are taken in chunks, and the first request must still run when the last one has begun.
            output = DECODED + point.rows * point.prompt // max_num_batched_tokens
            times_s[point].append(await waves.step_s(adapters, output, point.prompt))
    return {point: median(values) for point, values in times_s.items()}


async def _loading(
    client: AsyncClient, waves: Waves, adapter_bytes: Mapping[str, int], max_num_seqs: int
) -> tuple[float, float]:
    """Seconds to bring a byte into the pool while requests run, and how much longer their steps take meanwhile."""
    rows = [""] * min(CROWD, max_num_seqs)
    quiet_s = await waves.step_s(rows, LOADED_OUTPUT)
    crowd = asyncio.create_task(waves.step_s(rows, LOADED_OUTPUT))
    byte_s: list[float] = []
    for name in cycle(adapter_bytes):
        started_s = time.perf_counter()
        await client.adapters.unload(name)
        await client.adapters.load(name)
        if crowd.done():
            break
        byte_s.append((time.perf_counter() - started_s) / adapter_bytes[name])
    return median(byte_s or [0.0]), max(0.0, await crowd / quiet_s - 1)
