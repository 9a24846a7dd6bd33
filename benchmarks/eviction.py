"""`python -m benchmarks.eviction`: who should leave the pool, by replaying made-up requests.

The window chooser is the real one; there is no engine and no clock: one request at a time, and what a miss takes is
worked out from the sizes. A policy says what a resident is worth; the run whose worthiest adapter is worth least goes.

Decided before the first run: a policy takes the place of the least recently used if its mean wait is at least 5 %
shorter in the median of all Zipf and scan cases, in none of them more than 1 % longer, and nowhere more than 5 %.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import accumulate, product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.machine import facts
from gralora_kernels.alignment import ALIGNMENT
from gralora_runtime.adapters.residency.arena import ArenaAllocator
from gralora_runtime.adapters.residency.eviction import WORTHLESS, Segment, choose_window, worth_after_use

OUT = Path(__file__).parent / "results" / "eviction.json"
SEEDS = (201, 202, 203, 204)
ADAPTERS = 200
REQUESTS = 2000  # of each trace and seed
WARM_UP_SHARE = 6  # one request in so many, at the beginning, is not counted
RANKS = (4, 8, 16, 32, 64)
RANK_BYTES = 1_220_000  # of one rank in the pool: SmolLM2's seven projections in float32
# A file of r=16 took 55 ms to read, check and pack (NOTES.md); copies within host memory are limited by its bandwidth.
DISK_BYTE_S, DISK_S = 1 / 390e6, 5e-3
HOST_BYTE_S, HOST_S = 1 / 5e9, 1e-3
POOL_SHARES = (0.05, 0.15, 0.4)  # of the bytes of all adapters
HOST_SHARES = (0.0, 0.2)
SCAN_EVERY = 1000
SHIFT_EVERY = 500
SHIFT_BY = 20  # ranks of popularity
LRU, SERVED = "least recently used", "uses, halved with time"  # the second is the pool's own


@dataclass(slots=True, eq=False)
class Stay:
    """An adapter in the pool."""

    adapter: int
    offset: int
    last_used: int = 0
    uses: int = 0
    worth: float = WORTHLESS


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Of replays with several seeds, without their warm-up."""

    hit_rate: float
    host_rate: float  # of all requests: came from host memory
    disk_bytes: int
    mean_wait_ms: float


# How much a stay is worth after a use: its uses, what its return takes in seconds, its bytes, the clock of the policy.
Policy = Callable[[Stay, float, int, float], float]

POLICIES: dict[str, Policy] = {
    SERVED: lambda stay, _return_s, _bytes, _clock: worth_after_use(stay.worth, stay.last_used),
    LRU: lambda stay, _return_s, _bytes, _clock: stay.last_used,
    "frequency, size and cost": lambda stay, return_s, num_bytes, clock: clock + stay.uses * return_s / num_bytes * 1e9,
}


class Replay:
    """A pool and a host cache, without weights. What leaves the pool goes into the cache, whose stalest is lost."""

    def __init__(self, ranks: Sequence[int], policy: Policy, *, pool_ranks: int, host_ranks: int) -> None:
        self._ranks = ranks
        self._policy = policy
        self._arena = ArenaAllocator(pool_ranks * ALIGNMENT)  # a rank is one aligned piece
        self._stays: dict[int, Stay] = {}
        self._host: OrderedDict[int, None] = OrderedDict()
        self._host_free = host_ranks
        self._has_host = host_ranks > 0
        self._clock = 0.0  # the most that an evicted stay was worth
        self._uses = 0
        self.waits_s: list[float] = []
        self.places: list[str] = []

    def request(self, adapter: int) -> None:
        """Use the adapter, and note what that took."""
        wait_s, place = 0.0, "pool"
        if adapter not in self._stays:
            place = "host" if adapter in self._host else "disk"
            wait_s = self._return_s(adapter, place)
            if place == "host":
                self._forget(adapter)
            self._place(adapter)
        stay = self._stays[adapter]
        self._uses += 1
        stay.uses += 1
        stay.last_used = self._uses
        return_s = self._return_s(adapter, "host" if self._has_host else "disk")
        stay.worth = self._policy(stay, return_s, self._ranks[adapter] * RANK_BYTES, self._clock)
        self.waits_s.append(wait_s)
        self.places.append(place)

    def _place(self, adapter: int) -> None:
        numel = self._ranks[adapter] * ALIGNMENT
        window = choose_window(self._segments(), numel, need_slot=False)
        assert window is not None, adapter
        for victim in window.victims:
            self._arena.free(victim.offset)
            del self._stays[victim.adapter]
            self._clock = max(self._clock, victim.worth)
            self._keep(victim.adapter)
        self._arena.allocate_at(window.offset, numel)
        self._stays[adapter] = Stay(adapter, window.offset)

    def _segments(self) -> list[Segment[Stay]]:
        found = [
            Segment(
                offset=stay.offset,
                numel=self._ranks[stay.adapter] * ALIGNMENT,
                owner=stay,
                worth=stay.worth,
                usable=True,
            )
            for stay in self._stays.values()
        ]
        for offset, numel in self._arena.free_ranges():
            found.append(Segment(offset=offset, numel=numel, owner=None, worth=WORTHLESS, usable=True))
        return sorted(found, key=lambda segment: segment.offset)

    def _keep(self, adapter: int) -> None:
        self._host[adapter] = None
        self._host_free -= self._ranks[adapter]
        while self._host_free < 0:
            self._forget(next(iter(self._host)))

    def _forget(self, adapter: int) -> None:
        del self._host[adapter]
        self._host_free += self._ranks[adapter]

    def _return_s(self, adapter: int, place: str) -> float:
        num_bytes = self._ranks[adapter] * RANK_BYTES
        return HOST_S + num_bytes * HOST_BYTE_S if place == "host" else DISK_S + num_bytes * DISK_BYTE_S


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One trace over one size of pool and cache, by policy."""

    trace: str
    pool_share: float
    host_share: float
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    def wait_ratio(self, policy: str) -> float:
        """Beside the least recently used; below 1 is better."""
        return self.outcomes[policy].mean_wait_ms / self.outcomes[LRU].mean_wait_ms


def main() -> None:
    """Replay everything, print a table and keep the result."""
    options = _options()
    started_s = time.perf_counter()
    cases = list(replay_all(options.requests))
    verdicts = {policy: verdict(cases, policy) for policy in POLICIES if policy != LRU}
    print(f"{'trace':24} {'pool':>5} {'host':>5}" + "".join(f"{policy:>34}" for policy in POLICIES))
    for case in cases:
        told = (
            f"{o.hit_rate:.3f} {o.disk_bytes / 1e9:7.1f} GB {o.mean_wait_ms:6.1f} ms" for o in case.outcomes.values()
        )
        print(
            f"{case.trace:24} {case.pool_share:5.2f} {case.host_share:5.2f}" + "".join(f"{text:>34}" for text in told)
        )
    print(json.dumps(verdicts, indent=1))
    result: dict[str, Any] = {
        "machine": facts(), "seconds": round(time.perf_counter() - started_s, 1), "seeds": SEEDS, "adapters": ADAPTERS,
        "requests": options.requests, "verdicts": verdicts, "cases": [asdict(case) for case in cases],
    }  # fmt: skip
    options.out.write_text(json.dumps(result, indent=1) + "\n")


def replay_all(requests: int = REQUESTS, seeds: Sequence[int] = SEEDS) -> Iterator[Case]:
    """Every trace over every pool and cache by every policy. The same numbers each time."""
    shares = list(product(TRACES, POOL_SHARES, HOST_SHARES))
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as workers:
        yield from workers.map(partial(replay_case, requests, seeds), shares)


def replay_case(requests: int, seeds: Sequence[int], of: tuple[str, float, float]) -> Case:
    """By every policy."""
    trace, pool_share, host_share = of
    case = Case(trace=trace, pool_share=pool_share, host_share=host_share)
    for name, policy in POLICIES.items():
        parts = [part for seed in seeds for part in _replay(seed, TRACES[trace], requests, policy, of[1:])]
        places = Counter(place for _, place, _ in parts)
        case.outcomes[name] = Outcome(
            hit_rate=round(places["pool"] / len(parts), 4),
            host_rate=round(places["host"] / len(parts), 4),
            disk_bytes=sum(num_bytes for num_bytes, place, _ in parts if place == "disk"),
            mean_wait_ms=round(1e3 * statistics.fmean(wait_s for _, _, wait_s in parts), 4),
        )
    return case


def _replay(
    seed: int, trace: Trace, requests: int, policy: Policy, shares: tuple[float, float]
) -> list[tuple[int, str, float]]:
    """Bytes, place and wait of each request that counts."""
    rng = random.Random(seed)
    ranks = rng.choices(RANKS, k=ADAPTERS)
    pool_ranks, host_ranks = (int(sum(ranks) * share) for share in shares)
    run, wanted = Replay(ranks, policy, pool_ranks=pool_ranks, host_ranks=host_ranks), trace(rng, requests)
    for adapter in wanted:
        run.request(adapter)
    sizes = (ranks[adapter] * RANK_BYTES for adapter in wanted)
    return list(zip(sizes, run.places, run.waits_s, strict=True))[len(wanted) // WARM_UP_SHARE :]


def zipf(alpha: float, rng: random.Random, requests: int) -> list[int]:
    """Adapter i is wanted in proportion to 1 / (i + 1)^alpha."""
    weights = list(accumulate(1 / rank**alpha for rank in range(1, ADAPTERS + 1)))
    return rng.choices(range(ADAPTERS), cum_weights=weights, k=requests)


def scanned(rng: random.Random, requests: int) -> list[int]:
    """Now and then somebody asks for each adapter once."""
    wanted: list[int] = []
    for i, adapter in enumerate(zipf(1.0, rng, requests)):
        if i % SCAN_EVERY == SCAN_EVERY // 2:
            wanted += range(ADAPTERS)
        wanted.append(adapter)
    return wanted


def shifting(rng: random.Random, requests: int) -> list[int]:
    """Now and then other adapters are the popular ones."""
    return [(a + i // SHIFT_EVERY * SHIFT_BY) % ADAPTERS for i, a in enumerate(zipf(1.0, rng, requests))]


Trace = Callable[[random.Random, int], list[int]]  # which adapter each of so many requests wants

TRACES: dict[str, Trace] = {f"zipf {alpha}": partial(zipf, alpha) for alpha in (0.8, 1.0, 1.2)}
TRACES |= {"zipf 1.0 and scans": scanned, "zipf 1.0, shifting": shifting}


def verdict(cases: Sequence[Case], policy: str) -> dict[str, float | bool]:
    """By what was decided beforehand."""
    steady = [case.wait_ratio(policy) for case in cases if "shifting" not in case.trace]
    shifting = [case.wait_ratio(policy) for case in cases if "shifting" in case.trace]
    median, worst, worst_shifting = statistics.median(steady), max(steady), max(shifting)
    return {
        "median_wait_ratio": round(median, 3),
        "worst_wait_ratio": round(worst, 3),
        "worst_wait_ratio_shifting": round(worst_shifting, 3),
        "clearly_better": median <= 0.95 and worst <= 1.01 and worst_shifting <= 1.05,
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requests", type=int, default=REQUESTS, help="of each trace and seed, the warm-up included")
    parser.add_argument("--out", type=Path, default=OUT)
    return parser.parse_args()


if __name__ == "__main__":
    main()
