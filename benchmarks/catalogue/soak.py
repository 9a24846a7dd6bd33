"""Thousands of adapters that change under traffic: every answer is compared with what its content answers alone."""

from __future__ import annotations

import asyncio
import random
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.catalogue import memory, truth
from benchmarks.catalogue.answers import Answer, Traffic
from benchmarks.catalogue.churn import Churn
from benchmarks.catalogue.fleet import Fleet
from benchmarks.catalogue.gate import Gate, PartResult
from benchmarks.catalogue.history import Verdict
from benchmarks.catalogue.plan import Plan
from gralora_server.client import AsyncClient
from gralora_server.loadtest.local_server import LocalServer, running
from gralora_server.loadtest.metrics_page import Page
from gralora_server.metrics import series

EMPTY_S = 20.0  # within which memory of unloaded adapters is given back
SHOWN = 20  # wrong answers and problems that the result tells one by one
# Of requests for one version: it may be gone when operators changed the name.
GONE = {"ADAPTER_VERSION_NOT_FOUND", "ADAPTER_VERSION_LOST", "ADAPTER_NOT_FOUND", "ADAPTER_REJECTED"}
GROWTH = 0.05
AROUND_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """What a run left behind."""

    answers: Sequence[Answer]
    samples: Sequence[memory.Sample]
    left: dict[str, float]  # after everything was unloaded
    counters: dict[str, float]


def soak(fleet: Fleet, plan: Plan, folder: Path, *, seed: int, picture: Path) -> PartResult:
    """Leaves the fleet's directory changed."""
    names = list(fleet.initial)
    random.Random(seed).shuffle(names)
    churn = Churn(fleet, names, seed, plan.pause_s)
    room_bytes = plan.room * fleet.contents.mean_bytes()
    command = ["serve", "--model", str(fleet.contents.base.path), "--adapters", str(fleet.directory)]
    command += ["--address", "127.0.0.1:0", "--metrics-address", "127.0.0.1:0", "--log-level", "error"]
    command += ["--max-adapter-slots", str(plan.room), "--adapter-pool-bytes", str(room_bytes)]
    command += ["--host-cache-bytes", str(room_bytes // 2), "--kv-cache-bytes", "64MiB", "--max-model-len", "64"]
    command += ["--device", "cpu"]
    with running(command) as server:
        observed = asyncio.run(_observe(server, churn, plan, seed))
    memory.plot(observed.samples, picture)
    return judge(observed, churn, plan, folder)


async def _observe(server: LocalServer, churn: Churn, plan: Plan, seed: int) -> Observed:
    traffic = Traffic(
        names=churn.names,
        vocab_size=churn.fleet.contents.base.vocab_size,
        digest_of=churn.digest_of,
        clients=plan.clients,
        seed=seed,
    )
    samples: list[memory.Sample] = []
    until_s = time.monotonic() + 60 * plan.minutes
    watching = asyncio.create_task(memory.watch(server, plan.sample_s, samples))
    async with AsyncClient(server.address) as operators:
        answers, _ = await asyncio.gather(
            traffic.run(server.address, until_s), churn.run(operators, plan.operators, until_s)
        )
        watching.cancel()
        assert server.metrics_address is not None
        page = await asyncio.to_thread(Page.read, server.metrics_address)
        counted = {"loads": series.ADAPTER_LOADS, "evictions": series.ADAPTER_EVICTIONS}
        counters = {name: page.value(of) for name, of in counted.items()}
        left = await unload_all(operators, server.metrics_address)
    return Observed(answers=answers, samples=samples, left=left, counters=counters)


async def unload_all(client: AsyncClient, metrics_address: str) -> dict[str, float]:
    """What is left of leases and memory once all adapters are gone."""
    for adapter in await client.adapters.list():
        await client.adapters.unload(adapter.name)
    until_s = time.monotonic() + EMPTY_S
    while True:
        load = await client.load()
        page = await asyncio.to_thread(Page.read, metrics_address)
        left = {
            "adapters": float(len(await client.adapters.list())),
            "leases": float(load.adapter_leases),
            "slots": float(load.adapter_slots_used),
            "pool bytes": float(load.adapter_pool_bytes_used),
            "host bytes": page.value(series.ADAPTER_BYTES, tier="host"),
            "KV pages": float(load.pages_leased),
        }
        if not any(left.values()) or time.monotonic() > until_s:
            return left
        await asyncio.sleep(0.1)


def judge(observed: Observed, churn: Churn, plan: Plan, folder: Path) -> PartResult:
    """After the fact: contents have their digests, and each asked content its tokens."""
    note_initial(observed.answers, churn, folder)
    served = [answer for answer in observed.answers if not answer.error and answer.tokens]
    asked = {(churn.contents[a.digest], a.name) for a in served if a.digest in churn.contents}
    expected = truth.expected_tokens(churn.fleet.contents, folder / "truth", asked)
    verdicts = [(answer, verdict_of(answer, churn, expected)) for answer in observed.answers]
    counts = Counter(verdict for _, verdict in verdicts)
    peft = dict(random.Random(0).sample(sorted(expected.items()), min(plan.peft_samples, len(expected))))
    unlike = truth.unlike_peft(churn.fleet.contents, folder, peft)
    unexpected = sum(count for verdict, count in counts.items() if verdict.startswith("error, unexpected"))
    figures: dict[str, Any] = {
        "adapters": len(churn.names), "room": plan.room, "minutes": plan.minutes, "answers": len(served),
        "contents_answered": len(expected), "distinct_answers": len({(name, t) for (_, name), t in expected.items()}),
        "verdicts": dict(sorted(counts.items())), "changes": dict(sorted(churn.counts.items())),
        "peft_compared": len(peft), **observed.counters, "left": observed.left,
        "memory_mib": [[round(at_s, 1), size >> 20] for at_s, size in observed.samples],
        "problems": churn.problems[:SHOWN],
        "examples": [shown(a, v, churn) for a, v in verdicts if v in ("wrong", "stale") or "unexpected" in v][:SHOWN],
    }  # fmt: skip
    gates = [
        Gate("wrong answers", counts["wrong"], 0),
        Gate("stale answers", counts["stale"], 0),
        Gate("unexpected errors", unexpected, 0),
        Gate("changes that failed unexpectedly", sum(churn.unexpected.values()), 0),
        Gate("acknowledgements that cannot be", len(churn.problems) - sum(churn.unexpected.values()), 0),
        Gate("contents unlike PEFT", len(unlike), 0),
        Gate("left after unloading", sum(observed.left.values()), 0),
        Gate("growth of memory", memory.growth(observed.samples), GROWTH, is_speed=True),
    ]
    return PartResult(figures, gates)


def verdict_of(answer: Answer, churn: Churn, expected: dict[truth.Asked, truth.Tokens]) -> str:
    """ "right", "wrong", "stale", or an error's reason and whether it was to be expected."""
    one = churn.by_name[answer.name]
    if answer.error:
        changed = answer.wanted != "" and one.changes > 0 and answer.error in GONE
        if changed or one.history.is_excused(answer.error, answer.sent_s, answer.ended_s):
            return f"error, excused: {answer.error}"
        return f"error, unexpected: {answer.error}"
    content = churn.contents.get(answer.digest)
    right = expected.get((content, answer.name), ()) if content is not None else ()
    if content is None or answer.tokens != right[: len(answer.tokens)]:
        return "wrong"
    if answer.is_whole and len(answer.tokens) != answer.max_tokens:
        return "wrong"
    if answer.wanted:
        return "right" if answer.digest == answer.wanted else "wrong"
    found = one.history.judge(content, answer.sent_s, answer.ended_s)
    return "wrong" if found is Verdict.FOREIGN else found.value


def note_initial(answers: Sequence[Answer], churn: Churn, folder: Path) -> None:
    """Which digests the contents have that names had before anything changed."""
    for name in {answer.name for answer in answers}:
        number = churn.fleet.initial[name]
        if number not in churn.digests:
            directory = folder / f"initial-{number}"
            churn.fleet.contents.write(number, directory)
            churn.note(number, directory)
            shutil.rmtree(directory)


def shown(answer: Answer, verdict: str, churn: Churn) -> dict[str, Any]:
    """One answer with what was so and what was done around that time, in seconds from when the request was sent."""
    one = churn.by_name[answer.name]

    def since_s(at_s: float) -> float:
        return round(min(max(at_s - answer.sent_s, -AROUND_S), AROUND_S), 3)

    spans = [
        [span.content, since_s(span.from_s), since_s(span.to_s)]
        for span in one.history.spans
        if since_s(span.to_s) > -AROUND_S and since_s(span.from_s) < AROUND_S
    ]
    trail = [[since_s(at_s), what] for at_s, what in one.trail if abs(since_s(at_s)) < AROUND_S]
    shown = asdict(answer) | {"verdict": verdict, "content": churn.contents.get(answer.digest)}
    return shown | {"lasted_s": since_s(answer.ended_s), "spans": spans, "trail": trail}
