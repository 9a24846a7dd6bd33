"""A server in simulated time: the real scheduler and its pages, with steps that take what the profile says.

It is sent the same traces as a real one, and leaves the same records behind.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast

from gralora_runtime.request import StoppingParams
from gralora_runtime.sampling.outcome import SampledToken
from gralora_runtime.sampling.state import SamplerState
from gralora_runtime.scheduling.pages import PagePool
from gralora_runtime.scheduling.scheduler import Scheduler
from gralora_runtime.scheduling.sequence import Sequence as EngineSequence
from gralora_server.loadtest.record import OK, RequestRecord
from gralora_server.loadtest.trace import Trace, TraceRequest
from gralora_server.planner.profile import Profile
from gralora_server.planner.residency import Residency, lease_of

TOKEN = SampledToken(0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerPlan:
    """What a server would be started with."""

    max_num_seqs: int
    max_num_batched_tokens: int
    page_size: int
    num_pages: int
    adapter_pool_bytes: int
    max_adapter_slots: int


@dataclass(frozen=True, slots=True)
class Simulated:
    """Records as a client's, and what they did to the pool."""

    records: list[RequestRecord]
    loads: int
    resident_bytes: int  # of adapters, at most
    evicted_bytes: int  # of all evictions together


def simulate(
    trace: Trace, profile: Profile, server: ServerPlan, adapter_bytes: Mapping[str, int], *, warm: bool = False
) -> Simulated:
    """Ends when every request is answered.

    `adapter_bytes`: of the pool, by name, for every adapter of the trace. `warm`: as many of the first of them as fit
    are in the pool when it begins; otherwise it is empty.
    """
    simulation = _Simulation(trace, profile, server, adapter_bytes)
    if warm:
        simulation.residency.fill()
    return simulation.run()


@dataclass(slots=True)
class _Asked:
    """A request on its way."""

    request: TraceRequest
    adapter: int
    due_s: float
    counted: bool
    token_times_s: list[float] = field(default_factory=list)


class _Simulation:
    def __init__(self, trace: Trace, profile: Profile, server: ServerPlan, adapter_bytes: Mapping[str, int]) -> None:
        self._trace = trace
        self._profile = profile
        self._number = {name: i for i, name in enumerate(adapter_bytes)} | {"": -1}
        self._sizes = dict(enumerate(adapter_bytes.values()))
        self.residency = Residency(
            list(adapter_bytes.values()),
            pool_bytes=server.adapter_pool_bytes,
            max_slots=server.max_adapter_slots,
            load_byte_s=profile.load_byte_s,
        )
        self._scheduler = Scheduler(
            PagePool(server.num_pages, server.page_size, enable_prefix_cache=False),
            max_num_seqs=server.max_num_seqs,
            max_num_batched_tokens=server.max_num_batched_tokens,
            release_lease=lambda lease: self.residency.release(lease.slot),
            now_s=lambda: self._now_s,
        )
        self._now_s = 0.0
        self._ids = itertools.count()
        self._asked: dict[str, _Asked] = {}
        self._records: list[RequestRecord] = []
        self._arriving: list[tuple[float, int, str]] = []  # heap: when it is at the server, order, id
        self._unleased: deque[str] = deque()  # everything in the pool was leased when they came
        self._entering: list[tuple[float, int, str]] = []  # heap: when its adapter is there
        self._next = iter(trace.requests if trace.concurrency is None else itertools.cycle(trace.requests))

    def run(self) -> Simulated:
        if self._trace.concurrency is None:
            for request in self._next:
                self._ask(request, request.arrival_s)
        else:
            for request in itertools.islice(self._next, self._trace.concurrency):
                self._ask(request, 0.0)
        while self._asked:
            self._let_in()
            if not self._step():
                self._now_s = max(self._now_s, min(heap[0][0] for heap in (self._arriving, self._entering) if heap))
        pool = self.residency
        return Simulated(self._records, pool.loads, pool.most_bytes, pool.evicted_bytes)

    def _ask(self, request: TraceRequest, due_s: float) -> None:
        number = next(self._ids)
        counted = due_s >= self._trace.warmup_s
        self._asked[str(number)] = _Asked(request, self._number[request.adapter], due_s, counted)
        heapq.heappush(self._arriving, (due_s + self._profile.request_s, number, str(number)))

    def _let_in(self) -> None:
        """Arrivals ask for their adapter, and who has it is queued."""
        while self._arriving and self._arriving[0][0] <= self._now_s:
            self._unleased.append(heapq.heappop(self._arriving)[2])
        for _ in range(len(self._unleased)):
            request_id = self._unleased.popleft()
            ready_s = self.residency.acquire(self._asked[request_id].adapter, self._now_s)
            if ready_s is None:
                self._unleased.append(request_id)
            else:
                heapq.heappush(self._entering, (ready_s, int(request_id), request_id))
        while self._entering and self._entering[0][0] <= self._now_s:
            self._scheduler.add(self._sequence(heapq.heappop(self._entering)[2]))

    def _step(self) -> bool:
        """Compute one; False: nothing to compute."""
        plan = self._scheduler.plan()
        if plan is None:
            return False
        self._now_s = self._slowed(self._profile.plan_s(plan, self._sizes))
        ended = []
        for output in self._scheduler.commit(plan, [TOKEN for row in plan.rows if row.samples]):
            assert output.delta is not None
            self._asked[output.request_id].token_times_s.append(self._now_s)
            if output.delta.finished is not None:
                ended.append(output.request_id)
        for request_id in ended:
            self._end(request_id)
        return True

    def _slowed(self, left_s: float) -> float:
        """When a step of `left_s` ends: while an adapter is loaded, it goes slower."""
        now_s, slower = self._now_s, 1 + self._profile.load_slowdown
        while (until_s := self.residency.busy_until_s(now_s)) is not None:
            if left_s * slower <= until_s - now_s:
                return now_s + left_s * slower
            left_s -= (until_s - now_s) / slower
            now_s = until_s
        return now_s + left_s

    def _end(self, request_id: str) -> None:
        asked = self._asked.pop(request_id)
        self._records.append(
            RequestRecord(
                adapter=asked.request.adapter,
                intended_s=asked.due_s,
                sent_s=asked.due_s,
                token_times_s=tuple(asked.token_times_s),
                finished_s=self._now_s,
                status=OK,
                counted=asked.counted,
            )
        )
        if self._trace.concurrency is not None and self._now_s < self._trace.duration_s:
            self._ask(next(self._next), self._now_s)

    def _sequence(self, request_id: str) -> EngineSequence:
        asked = self._asked[request_id]
        return EngineSequence(
            request_id=request_id,
            adapter_name=asked.request.adapter,
            tokens=[0] * asked.request.prompt_tokens,
            num_prompt=asked.request.prompt_tokens,
            max_tokens=asked.request.output_tokens,
            stopping=StoppingParams(ignore_eos=True),
            eos_token_ids=(),
            lease=lease_of(asked.adapter),
            sampler=cast("SamplerState", None),  # nobody samples
            detokenizer=None,
            arrival_s=asked.due_s,
            seed=0,
        )
