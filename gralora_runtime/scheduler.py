"""Decides what the next step computes. Counts tokens and pages; knows nothing of tensors, models or transports.

Every running sequence gets its next token first; what is left of the step's token budget goes to prompts, in chunks, in
order of arrival. So a long prompt cannot stall those that stream. When pages run out the youngest running sequence is
put back into the queue and computed again later: it keeps its adapter and its tokens, and loses only its pages.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from gralora_runtime.adapters.lease import AdapterLease
from gralora_runtime.errors import DeadlineExceededError, GraloraError, NumericalError, RequestCancelledError
from gralora_runtime.failure import contained, request_failed, step_failed
from gralora_runtime.pages import PagePool, page_key
from gralora_runtime.plan import AdapterUse, RowPlan, StepPlan
from gralora_runtime.request import Delta, FinishReason
from gralora_runtime.sampling.outcome import RowFailure, Sampled, SamplingFailure
from gralora_runtime.sequence import Sequence, SequenceStatus


@dataclass(frozen=True, slots=True)
class StepOutput:
    """Something to tell one request's client: a delta, or the error that ended the request."""

    request_id: str
    delta: Delta | None = None
    error: GraloraError | None = None


@dataclass(slots=True)
class SchedulerCounters:
    """Totals since start."""

    prefill_tokens: int = 0  # computed: of prompts, and again of what was preempted
    decode_tokens: int = 0  # computed, one at a time, after the prompt
    generated_tokens: int = 0
    preemptions: int = 0
    prefix_hit_tokens: int = 0
    request_failures: int = 0  # requests that ended because our code failed on them
    step_failures: int = 0  # steps whose shared part failed, which ended all their requests


class Scheduler:
    """Owns the sequences and their pages. Not thread-safe: only the engine's thread calls it."""

    def __init__(
        self,
        pages: PagePool,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        release_lease: Callable[[AdapterLease], None],
        now_s: Callable[[], float],
    ) -> None:
        self.pages = pages
        self.counters = SchedulerCounters()
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._release_lease = release_lease
        self._now_s = now_s
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []  # in order of admission: the last one is the youngest
        self._by_id: dict[str, Sequence] = {}
        self._outputs: list[StepOutput] = []

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def has_work(self) -> bool:
        return bool(self._running or self._waiting)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; its adapter's lease now belongs to the scheduler."""
        assert sequence.request_id not in self._by_id, f"request id {sequence.request_id!r} used twice"
        self._by_id[sequence.request_id] = sequence
        self._waiting.append(sequence)

    def cancel(self, request_id: str) -> None:
        """End a sequence and free what it holds. Unknown ids are sequences that ended already."""
        sequence = self._by_id.get(request_id)
        if sequence is not None:
            self._end_early(sequence, FinishReason.CANCELLED, RequestCancelledError(request_id))

    def plan(self) -> StepPlan | None:
        """Choose the rows of the next step and lease their pages; None when there is nothing to compute."""
        self._expire_deadlines()
        budget = self._max_num_batched_tokens
        preemptions_before = self.counters.preemptions
        rows: dict[str, int] = {}  # request id -> tokens, in order
        for sequence in sorted(self._running, key=lambda running: running.num_uncomputed > 1):
            count = min(sequence.num_uncomputed, budget)
            if sequence.status is SequenceStatus.RUNNING and count and self._reserve(sequence, count, rows):
                rows[sequence.request_id] = count
                budget -= count
        # Who was just preempted would only take the pages back: admit nobody in such a step.
        crowded = self.counters.preemptions > preemptions_before
        while budget and self._waiting and len(self._running) < self._max_num_seqs and not crowded:
            admitted = self._try_to_admit(self._waiting[0], budget)
            if admitted is None:
                continue
            if admitted == 0:
                break
            rows[self._running[-1].request_id] = admitted
            budget -= admitted
        return self._freeze(rows) if rows else None

    def commit(self, plan: StepPlan, sampled: Mapping[str, Sampled]) -> list[StepOutput]:
        """Take in a step's results: one token, or the reason why there is none, per row that samples.

        A row whose own code fails ends with `RequestFailedError`; it is the only one that notices.
        """
        for row in plan.rows:
            try:
                self._commit_row(row, sampled)
            except BaseException as error:
                if not contained(error):
                    raise
                self.fail(row.request_id, error)
        return self.take_outputs()

    def fail(self, request_id: str, cause: BaseException) -> None:
        """End one request because our code failed on it, wherever it stands, and put the books right."""
        self.counters.request_failures += 1
        self._outputs.append(StepOutput(request_id, error=request_failed(request_id, cause)))
        self._drop(request_id)
        self._reclaim_pages()

    def fail_step(self, plan: StepPlan | None, cause: BaseException) -> None:
        """End the rows of a step whose shared part failed, and put the books right; all others go on.

        Without a plan it was the planning that failed: then all end but those that it had not touched.
        """
        self.counters.step_failures += 1
        if plan is not None:
            ids = [row.request_id for row in plan.rows]
        else:
            untouched = {sequence.request_id for sequence in self._waiting if not sequence.pages}
            ids = [request_id for request_id in self._by_id if request_id not in untouched]
        error = step_failed(len(ids), cause)
        for request_id in ids:
            self._outputs.append(StepOutput(request_id, error=error))
            self._drop(request_id)
        self._reclaim_pages()

    def adapters(self) -> tuple[frozenset[str], frozenset[str]]:
        """Names of the adapters in the batch, and of those that wait for it; "" is the base model.

        Other threads may ask: sequences are copied in one call each, while which the engine's thread cannot move them.
        """
        running, waiting = self._running.copy(), self._waiting.copy()
        return frozenset(s.adapter_name for s in running), frozenset(s.adapter_name for s in waiting)

    def take_outputs(self) -> list[StepOutput]:
        """What has to be told since the last call."""
        outputs, self._outputs = self._outputs, []
        return outputs

    def abandon_all(self) -> list[Sequence]:
        """Retire every sequence without a word to its client, and return them. For an engine that is stopping."""
        abandoned = list(self._by_id.values())
        for sequence in abandoned:
            self._retire(sequence)
        return abandoned

    def sequence(self, request_id: str) -> Sequence:
        """A sequence that waits or runs."""
        return self._by_id[request_id]

    def check_integrity(self) -> None:
        """Assert that every page lease belongs to exactly one running sequence."""
        self.pages.check_integrity(page for sequence in self._running for page in sequence.pages)
        assert not any(sequence.pages for sequence in self._waiting), "a waiting sequence holds pages"
        assert len(self._by_id) == len(self._running) + len(self._waiting)

    def _expire_deadlines(self) -> None:
        now_s = self._now_s()
        late = [s for s in self._by_id.values() if s.deadline_s is not None and s.deadline_s <= now_s]
        for sequence in late:
            self._end_early(sequence, FinishReason.DEADLINE, DeadlineExceededError(sequence.request_id))

    def _end_early(self, sequence: Sequence, reason: FinishReason, error: GraloraError) -> None:
        """A started sequence ends with what it has and the reason; one without a token ends with the error."""
        if sequence.num_output:
            self._outputs.append(StepOutput(sequence.request_id, Delta(finished=sequence.finish(reason))))
        else:
            self._outputs.append(StepOutput(sequence.request_id, error=error))
        self._retire(sequence)

    def _try_to_admit(self, sequence: Sequence, budget: int) -> int | None:
        """As `_admit`; None: it failed on this sequence, which has ended."""
        try:
            return self._admit(sequence, budget)
        except BaseException as error:
            if not contained(error):
                raise
            self.fail(sequence.request_id, error)
            return None

    def _admit(self, sequence: Sequence, budget: int) -> int:
        """Start the oldest waiting sequence with up to `budget` tokens; 0 when there are no pages for it.

        Pages are leased for all its tokens at once, not for the first chunk: half-admitted prompts that wait for each
        other's pages would only preempt one another.
        """
        matched, keys = self.pages.match(sequence.parent_key, sequence.tokens)
        num_matched = len(matched) * self.pages.page_size
        fresh = self.pages.allocate(self._pages_for(len(sequence.tokens)) - len(matched))
        if fresh is None:
            self.pages.release(matched)
            return 0
        self._waiting.popleft()
        self._running.append(sequence)
        sequence.status = SequenceStatus.RUNNING
        sequence.pages, sequence.page_keys = matched + fresh, keys
        sequence.num_computed = num_matched
        sequence.begin(self._now_s())
        self.counters.prefix_hit_tokens += num_matched
        return min(sequence.num_uncomputed, budget)

    def _reserve(self, sequence: Sequence, count: int, rows: dict[str, int]) -> bool:
        """Lease pages for `count` more tokens, preempting younger sequences; False: it was preempted itself."""
        missing = self._pages_for(sequence.num_computed + count) - len(sequence.pages)
        while missing > self.pages.num_available:
            victim = self._running[-1]
            self._preempt(victim)
            rows.pop(victim.request_id, None)
            if victim is sequence:
                return False
        fresh = self.pages.allocate(missing)
        assert fresh is not None
        sequence.pages.extend(fresh)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._free_pages(sequence)
        sequence.status = SequenceStatus.WAITING
        sequence.preemptions += 1
        self.counters.preemptions += 1
        self._waiting.appendleft(sequence)

    def _freeze(self, counts: Mapping[str, int]) -> StepPlan:
        rows = [self._row(self._by_id[request_id], count) for request_id, count in counts.items()]
        rows.sort(key=lambda row: len(row.token_ids) > 1)  # stable: decode first
        return StepPlan(tuple(rows), sum(len(row.token_ids) == 1 for row in rows))

    def _row(self, sequence: Sequence, count: int) -> RowPlan:
        start, lease = sequence.num_computed, sequence.lease
        return RowPlan(
            request_id=sequence.request_id,
            token_ids=tuple(sequence.tokens[start : start + count]),
            start=start,
            pages=tuple(sequence.pages),
            adapter=AdapterUse(lease.slot, lease.generation, lease.width),
            samples=start + count == len(sequence.tokens),
        )

    def _count_tokens(self, sequence: Sequence, row: RowPlan) -> None:
        if sequence.num_output and len(row.token_ids) == 1:
            self.counters.decode_tokens += 1
        else:
            self.counters.prefill_tokens += len(row.token_ids)

    def _commit_row(self, row: RowPlan, sampled: Mapping[str, Sampled]) -> None:
        sequence = self._by_id[row.request_id]
        self._count_tokens(sequence, row)
        sequence.num_computed = row.context_len
        self._publish_full_pages(sequence)
        if row.samples:
            self._commit_token(sequence, sampled[row.request_id])

    def _commit_token(self, sequence: Sequence, sampled: Sampled) -> None:
        if isinstance(sampled, RowFailure):
            self.fail(sequence.request_id, sampled.cause)
            return
        if isinstance(sampled, SamplingFailure):
            error = NumericalError(sequence.request_id, sequence.adapter_name, sampled.problem)
            self._outputs.append(StepOutput(sequence.request_id, error=error))
            self._retire(sequence)
            return
        delta = sequence.accept(sampled)
        self.counters.generated_tokens += 1
        self._outputs.append(StepOutput(sequence.request_id, delta))
        if delta.finished is not None:
            self._retire(sequence)

    def _publish_full_pages(self, sequence: Sequence) -> None:
        size = self.pages.page_size
        for index in range(len(sequence.page_keys), sequence.num_computed // size):
            key = page_key(sequence.parent_key, sequence.tokens[index * size : (index + 1) * size])
            sequence.page_keys.append(key)
            self.pages.publish(sequence.pages[index], key)

    def _retire(self, sequence: Sequence) -> None:
        if sequence.status is SequenceStatus.RUNNING:
            self._running.remove(sequence)
        else:
            self._waiting.remove(sequence)
        self._free_pages(sequence)
        sequence.status = SequenceStatus.FINISHED
        del self._by_id[sequence.request_id]
        self._release_lease(sequence.lease)

    def _drop(self, request_id: str) -> None:
        """Forget a sequence after a failure, which may have left it anywhere. It has its lease while it has an id."""
        sequence = self._by_id.pop(request_id, None)
        if sequence is None:
            return
        self._running = [running for running in self._running if running is not sequence]
        self._waiting = deque(waiting for waiting in self._waiting if waiting is not sequence)
        sequence.status = SequenceStatus.FINISHED
        self._release_lease(sequence.lease)

    def _reclaim_pages(self) -> None:
        self.pages.reclaim(page for sequence in self._running for page in sequence.pages)

    def _free_pages(self, sequence: Sequence) -> None:
        self.pages.release(sequence.pages)
        sequence.pages, sequence.page_keys = [], []
        sequence.num_computed = 0

    def _pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.pages.page_size)
