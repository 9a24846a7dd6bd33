"""Stand-ins for what the scheduler drives but does not look into, and a driver that plays the model's part."""

from __future__ import annotations

import math
from collections.abc import Callable

from gralora_runtime.adapters.residency.lease import AdapterLease
from gralora_runtime.detokenizer import TextDelta
from gralora_runtime.plan import StepPlan
from gralora_runtime.request import StoppingParams
from gralora_runtime.sampling.outcome import SampledToken
from gralora_runtime.scheduling.pages import PagePool
from gralora_runtime.scheduling.scheduler import Scheduler, StepOutput
from gralora_runtime.scheduling.sequence import Sequence


class FakeSampler:
    def __init__(self) -> None:
        self.observed: list[int] = []

    def observe(self, token_id: int) -> None:
        self.observed.append(token_id)


class FakeDetokenizer:
    """Token 7 is the text "<7>"."""

    def push(self, token_id: int) -> TextDelta:
        return TextDelta(f"<{token_id}>")

    def flush(self) -> str:
        return ""


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def fake_lease(digest: str = "", slot: int = -1) -> AdapterLease:
    return AdapterLease(name=digest, digest=digest, slot=slot, generation=1, width=8, serial=0)


def fake_sequence(
    request_id: str,
    prompt: list[int],
    *,
    max_tokens: int = 4,
    stopping: StoppingParams | None = None,
    lease: AdapterLease | None = None,
    deadline_s: float = math.inf,
    tenant: str = "",
    weight: float = 1.0,
    priority: int = 0,
    prefix_scope: str = "",
) -> Sequence:
    return Sequence(
        request_id=request_id,
        adapter_name="",
        tokens=list(prompt),
        num_prompt=len(prompt),
        max_tokens=max_tokens,
        stopping=stopping or StoppingParams(ignore_eos=True),
        eos_token_ids=frozenset({1}),
        lease=lease or fake_lease(),
        sampler=FakeSampler(),  # type: ignore[arg-type]
        detokenizer=FakeDetokenizer(),  # type: ignore[arg-type]
        arrival_s=0.0,
        seed=0,
        deadline_s=deadline_s,
        tenant=tenant,
        weight=weight,
        priority=priority,
        prefix_scope=prefix_scope,
    )


class Harness:
    """A scheduler whose model answers with `next_token(request_id, context_len)`; checks integrity after every step."""

    def __init__(
        self,
        *,
        num_pages: int = 64,
        page_size: int = 4,
        max_num_seqs: int = 8,
        max_num_batched_tokens: int = 16,
        next_token: Callable[[str, int], int] = lambda _, context_len: 100 + context_len,
    ) -> None:
        self.clock = Clock()
        self.released: list[AdapterLease] = []
        self.pool = PagePool(num_pages, page_size)
        self.plans: list[StepPlan] = []
        self.outputs: dict[str, list[StepOutput]] = {}
        self._next_token = next_token
        self.scheduler = Scheduler(
            self.pool,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            release_lease=self.released.append,
            now_s=self.clock,
        )

    def step(self) -> StepPlan | None:
        plan = self.scheduler.plan()
        self.scheduler.check_integrity()
        if plan is None:
            outputs = self.scheduler.take_outputs()
        else:
            self.plans.append(plan)
            sampled = [
                SampledToken(self._next_token(row.request_id, row.context_len)) for row in plan.rows if row.samples
            ]
            outputs = self.scheduler.commit(plan, sampled)
        for output in outputs:
            self.outputs.setdefault(output.request_id, []).append(output)
        self.scheduler.check_integrity()
        return plan

    def run(self, max_steps: int = 1000) -> None:
        for _ in range(max_steps):
            if not self.scheduler.has_work:
                return
            self.step()
        raise AssertionError(f"still working after {max_steps} steps")

    def tokens(self, request_id: str) -> list[int]:
        return [t for output in self.outputs[request_id] if output.delta for t in output.delta.token_ids]

    def finish_reason(self, request_id: str) -> str | None:
        delta = self.outputs[request_id][-1].delta
        return delta.finished.reason.value if delta and delta.finished else None
