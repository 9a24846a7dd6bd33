"""Decides what the next step computes. Counts tokens and pages; knows nothing of tensors, models or transports.

Every running sequence gets its next token first; what is left of the step's token budget goes to prompts, in chunks. So
a long prompt cannot stall those that stream. Whose prompt comes next is the tenant's that was served least
(`fairness.py`), and of a tenant the first to arrive. When rows or pages run out somebody may have to give way
(`preemption.py`): it is put back into the queue and computed again later, keeps its adapter and its tokens, and loses
only its pages.

A step may be planned before the one before has ended. Then a sequence's newest token is pending: its row says which
sampling row will choose it. Who ends meanwhile has a row too many on its way, whose result is dropped. What it held is
free at once: pages because steps run in order, and its adapter's slot because it is not cleared before they have ended.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Several
from dataclasses import dataclass, replace

from gralora_runtime.adapters.residency.lease import AdapterLease
from gralora_runtime.errors import DeadlineExceededError, GraloraError, NumericalError, RequestCancelledError
from gralora_runtime.failure import contained, request_failed, step_failed
from gralora_runtime.observation.holdups import Hold
from gralora_runtime.plan import UNKNOWN, RowPlan, StepPlan
from gralora_runtime.request import Delta, FinishReason
from gralora_runtime.sampling.outcome import MatchingFailure, RowFailure, Sampled, SamplingFailure
from gralora_runtime.scheduling.fairness import CPU_PRICES, SHARE_BESIDE_OTHERS, Account, Ledger, Prices
from gralora_runtime.scheduling.marking import Marking
from gralora_runtime.scheduling.pages import PagePool
from gralora_runtime.scheduling.preemption import giver_among, giver_of_row, givers_of_pages
from gralora_runtime.scheduling.roster import Roster
from gralora_runtime.scheduling.sequence import Sequence, SequenceStatus


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
    pauses: int = 0  # because a client did not read
    prefix_hit_tokens: int = 0
    request_failures: int = 0  # requests that ended because our code failed on them
    step_failures: int = 0  # steps whose shared part failed, which ended all their requests


class Scheduler:
    """Plans steps and takes in their results. Not thread-safe: only the engine's thread calls it."""

    def __init__(
        self,
        pages: PagePool,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        release_lease: Callable[[AdapterLease], None],
        now_s: Callable[[], float],
        prices: Prices = CPU_PRICES,
    ) -> None:
        self.pages = pages
        self.ledger = Ledger(prices)
        self.marking = Marking(self.ledger, now_s)
        self.roster = Roster(
            pages,
            self.ledger,
            max_num_seqs=max_num_seqs,
            release_lease=release_lease,
            ended=self.marking.ended,
        )
        self.counters = SchedulerCounters()
        self._max_num_batched_tokens = max_num_batched_tokens
        self._now_s = now_s
        self._outputs: list[StepOutput] = []
        # Of the step that is being planned: who gave way, whether anybody did so for want of pages, and what whoever
        # comes next waits for.
        self._gave_way: set[Sequence] = set()
        self._is_crowded = False
        self._hold = Hold.TURN
        self._next_deadline_s = math.inf  # nobody's is sooner

    @property
    def num_running(self) -> int:
        return len(self.roster.running)

    @property
    def num_waiting(self) -> int:
        return len(self.roster.waiting)

    @property
    def num_paused(self) -> int:
        return len(self.roster.paused)

    @property
    def has_work(self) -> bool:
        return bool(self.roster.running or self.roster.waiting)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; its adapter's lease now belongs to the scheduler."""
        self.roster.enter(sequence)
        self.marking.queued(sequence, self.roster.running)
        if sequence.loaded_bytes:
            self.ledger.charge(sequence.tenant, sequence.loaded_bytes * self.ledger.prices.adapter_byte)
        self._next_deadline_s = min(self._next_deadline_s, sequence.deadline_s)

    def cancel(self, request_id: str) -> None:
        """End a sequence and free what it holds. Unknown ids are sequences that ended already."""
        sequence = self.roster.get(request_id)
        if sequence is not None:
            self._end_early(sequence, FinishReason.CANCELLED, RequestCancelledError(request_id))

    def pause(self, request_id: str) -> None:
        """Its client does not read: its row and its pages are for others until `resume`."""
        sequence = self.roster.get(request_id)
        if sequence is not None and sequence.status is not SequenceStatus.PAUSED:
            self.roster.pause(sequence)
            self.marking.paused(sequence)
            self.counters.pauses += 1

    def resume(self, request_id: str) -> None:
        """It goes on where it was, as soon as it is its turn."""
        sequence = self.roster.paused.get(request_id)
        if sequence is not None:
            self.roster.resume(sequence)
            self.marking.resumed(sequence)

    def plan(self) -> StepPlan | None:
        """Choose the rows of the next step and lease their pages; None when there is nothing to compute."""
        self._expire_deadlines()
        self._gave_way, self._is_crowded, self._hold = set(), False, Hold.TURN
        rows: dict[Sequence, int] = {}  # how many tokens, in order
        prompts = self._plan_decoding(rows)
        self._plan_prompts(prompts, rows)
        self.marking.holdups.note(self._hold if self.roster.waiting else None, self._now_s())
        return self._freeze(rows) if rows else None

    def commit(self, plan: StepPlan, sampled: Iterable[Sampled]) -> list[StepOutput]:
        """Take in a step's results: one token, or the reason why there is none, per row that samples, in their order.

        A row whose own code fails ends with `RequestFailedError`; it is the only one that notices. Rows of sequences
        that ended since the step was planned are dropped.
        """
        results = iter(sampled)
        for row in plan.rows:
            result = next(results) if row.samples else None
            try:
                self._commit_row(row, result)
            except BaseException as error:
                if not contained(error):
                    raise
                self.fail(row.request_id, error)
        return self.take_outputs()

    def fail(self, request_id: str, cause: BaseException) -> None:
        """End one request because our code failed on it, wherever it stands, and put the books right."""
        self.counters.request_failures += 1
        self._outputs.append(StepOutput(request_id, error=request_failed(request_id, cause)))
        self.roster.drop([request_id])

    def fail_step(self, plan: StepPlan | None, cause: BaseException) -> bool:
        """End the rows of a step whose shared part failed, and put the books right; all others go on. Returns whether
        it still concerned anybody: a step that was launched before its forerunner failed may not.

        Without a plan it was the planning that failed: then all end but those that it had not touched.
        """
        if plan is not None:
            ids = [row.request_id for row in plan.rows if self.roster.of_row(row) is not None]
            if not ids:
                return False
        else:
            others = [*self.roster.waiting, *self.roster.paused.values()]
            untouched = {sequence.request_id for sequence in others if not sequence.pages}
            ids = [request_id for request_id in self.roster.ids() if request_id not in untouched]
        self.counters.step_failures += 1
        error = step_failed(len(ids), cause)
        self._outputs += [StepOutput(request_id, error=error) for request_id in ids]
        self.roster.drop(ids)
        return True

    def shed(self, plan: StepPlan, cause: BaseException) -> None:
        """Of a step that ran out of memory end the younger half, one at least; the others' rows are planned anew.

        For a step of which nothing has been taken in, and on which no other one follows.
        """
        rows = sorted(plan.rows, key=lambda row: row.stay)  # in order of admission
        num_kept = len(rows) // 2
        self.fail_step(replace(plan, rows=tuple(rows[num_kept:])), cause)
        for row in rows[:num_kept]:
            sequence = self.sequence(row.request_id)
            sequence.num_computed = row.start
            sequence.num_pending -= int(row.samples)

    def adapters(self) -> tuple[frozenset[str], frozenset[str]]:
        """Names of the adapters in the batch, and of those that wait for it; "" is the base model.

        Other threads may ask.
        """
        by_status: dict[bool, set[str]] = {True: set(), False: set()}
        for sequence in self.roster.every():
            by_status[sequence.status is SequenceStatus.RUNNING].add(sequence.adapter_name)
        return frozenset(by_status[True]), frozenset(by_status[False])

    def take_outputs(self) -> list[StepOutput]:
        """What has to be told since the last call."""
        outputs, self._outputs = self._outputs, []
        return outputs

    def abandon_all(self) -> Several[Sequence]:
        """Retire every sequence without a word to its client, and return them. For an engine that is stopping."""
        abandoned = self.roster.every()
        for sequence in abandoned:
            self.roster.retire(sequence)
        return abandoned

    def sequence(self, request_id: str) -> Sequence:
        """A sequence that waits or runs."""
        sequence = self.roster.get(request_id)
        assert sequence is not None, f"{request_id!r} has ended"
        return sequence

    def check_integrity(self) -> None:
        """Assert that every page lease belongs to exactly one running sequence."""
        self.roster.check_integrity()

    def _expire_deadlines(self) -> None:
        now_s = self._now_s()
        if now_s < self._next_deadline_s:
            return
        for sequence in [sequence for sequence in self.roster.every() if sequence.deadline_s <= now_s]:
            self._end_early(sequence, FinishReason.DEADLINE, DeadlineExceededError(sequence.request_id))
        coming = (sequence.deadline_s for sequence in self.roster.every())
        self._next_deadline_s = min(coming, default=math.inf)

    def _end_early(self, sequence: Sequence, reason: FinishReason, error: GraloraError) -> None:
        """A started sequence ends with what it has and the reason; one without a token ends with the error."""
        if sequence.num_output:
            self._outputs.append(StepOutput(sequence.request_id, Delta(finished=sequence.finish(reason))))
        else:
            self._outputs.append(StepOutput(sequence.request_id, error=error))
        self.roster.retire(sequence)

    def _plan_decoding(self, rows: dict[Sequence, int]) -> list[Sequence]:
        """One token for each running sequence that has come to that; the others, whose prompts are not done yet."""
        prompts: list[Sequence] = []
        for sequence in self.roster.running.copy():
            if sequence.num_uncomputed > 1:
                prompts.append(sequence)
            elif not (sequence.num_pending and sequence.has_all_tokens) and self._reserve(sequence, 1, rows):
                self._take(sequence, 1, rows)
        return prompts

    def _plan_prompts(self, prompts: list[Sequence], rows: dict[Sequence, int]) -> None:
        """What is left of the step's tokens, for the tenant that was served least, and so on."""
        left = self._max_num_batched_tokens - len(rows)
        left_for_crowds = int(self._max_num_batched_tokens * SHARE_BESIDE_OTHERS)
        # Beside what each had been served before this step's prompts.
        decoding = {account: account.served for account in map(self._account, rows)}
        starting: dict[Account, float] = {}
        admitting = not self._is_crowded  # who just lost its pages would only take them back
        while left > 0:
            started = min(prompts, key=lambda sequence: self._account(sequence).served, default=None)
            waiting = self.roster.waiting.first() if admitting else None
            if waiting is not None and (waiting.num_pending or waiting in self._gave_way):
                admitting, waiting = False, None
            if started is None and waiting is None:
                return
            sequence = _less_served(started, waiting, self.ledger)
            account = self._account(sequence)
            if account.crowds(starting):
                return  # so that this step is short
            most = min(left, left_for_crowds) if account.crowds(decoding) else left
            if most <= 0:
                return
            served = account.served
            if sequence is started:
                prompts.remove(sequence)
                count = self._continue(sequence, most, rows)
            else:
                admitted = self._try_to_admit(sequence, most, rows)
                if admitted is None:
                    continue
                admitting = admitted > 0
                count = admitted
            if count:
                starting.setdefault(account, served)
            left -= count
            left_for_crowds -= count

    def _account(self, sequence: Sequence) -> Account:
        return self.ledger.account(sequence.tenant)

    def _continue(self, sequence: Sequence, most: int, rows: dict[Sequence, int]) -> int:
        """The next chunk of a prompt; 0 if it lost its pages."""
        count = min(sequence.num_uncomputed, most)
        if not self._reserve(sequence, count, rows):
            return 0
        self._take(sequence, count, rows)
        return count

    def _take(self, sequence: Sequence, count: int, rows: dict[Sequence, int]) -> None:
        """So many of its tokens are computed in this step, and paid for unless they were before."""
        rows[sequence] = count
        start, end = max(sequence.num_paid, sequence.num_computed), sequence.num_computed + count
        if end > start:
            of_prompt = max(0, min(end, sequence.num_prompt) - start)
            prices = self.ledger.prices
            price = of_prompt * prices.prompt_token + (end - start - of_prompt) * prices.output_token
            self.ledger.charge(sequence.tenant, price)
            sequence.num_paid = end

    def _try_to_admit(self, sequence: Sequence, most: int, rows: dict[Sequence, int]) -> int | None:
        """As `_admit`; None: it failed on this sequence, which has ended."""
        try:
            return self._admit(sequence, most, rows)
        except BaseException as error:
            if not contained(error):
                raise
            self.fail(sequence.request_id, error)
            return None

    def _admit(self, sequence: Sequence, most: int, rows: dict[Sequence, int]) -> int:
        """Start a waiting sequence with up to `most` tokens; 0 when there is no row or there are no pages for it.

        Pages are leased for all its tokens at once, not for the first chunk: half-admitted prompts that wait for each
        other's pages would only preempt one another.
        """
        if not self.roster.has_seat and not self._free_a_row(sequence, rows):
            self._hold = Hold.PLACE
            return 0
        matched, keys = self.pages.match(sequence.chain, sequence.tokens)
        num_fresh = self._pages_for(len(sequence.tokens)) - len(matched)
        if num_fresh > self.pages.num_available:
            self._free_pages_for(sequence, num_fresh, rows)
        fresh = self.pages.allocate(num_fresh)
        if fresh is None:
            self._hold = Hold.PAGES
            self.pages.release(matched)
            return 0
        self.roster.start(sequence, (*matched, *fresh), keys)
        sequence.begin(self._now_s())
        self.marking.started(sequence)
        self.counters.prefix_hit_tokens += sequence.num_computed
        count = min(sequence.num_uncomputed, most)
        self._take(sequence, count, rows)
        return count

    def _free_a_row(self, sequence: Sequence, rows: dict[Sequence, int]) -> bool:
        victim = giver_of_row(sequence, self.roster.running, self.ledger)
        if victim is None:
            return False
        self._preempt(victim, rows, Hold.PLACE, sequence)
        return True

    def _free_pages_for(self, sequence: Sequence, num_pages: int, rows: dict[Sequence, int]) -> None:
        missing = num_pages - self.pages.num_available
        for victim in givers_of_pages(sequence, num_pages, missing, self.roster.running, self.ledger):
            self._preempt(victim, rows, Hold.PAGES, sequence)

    def _reserve(self, sequence: Sequence, count: int, rows: dict[Sequence, int]) -> bool:
        """Lease pages for `count` more tokens, preempting others; False: it was preempted itself."""
        if sequence.status is not SequenceStatus.RUNNING:
            return False
        missing = self._pages_for(sequence.num_computed + count) - len(sequence.pages)
        if missing <= 0:
            return True
        while missing > self.pages.num_available:
            self._is_crowded, self._hold = True, Hold.PAGES
            victim = giver_among(self.roster.running)
            self._preempt(victim, rows, Hold.PAGES, sequence)
            if victim is sequence:
                return False
        fresh = self.pages.allocate(missing)
        assert fresh is not None
        sequence.pages += tuple(fresh)
        return True

    def _preempt(self, sequence: Sequence, rows: dict[Sequence, int], hold: Hold, to: Sequence) -> None:
        rows.pop(sequence, None)
        self._gave_way.add(sequence)
        self.roster.put_back(sequence)
        self.marking.gave_way(sequence, hold, to)
        sequence.preemptions += 1
        self.counters.preemptions += 1

    def _freeze(self, counts: Mapping[Sequence, int]) -> StepPlan:
        decoding = [sequence for sequence, count in counts.items() if count == 1]
        rows = [self._row(sequence, 1) for sequence in decoding]
        rows += [self._row(sequence, count) for sequence, count in counts.items() if count > 1]
        sampling = [row for row in rows if row.samples]
        for place, row in enumerate(sampling):
            sequence = self.sequence(row.request_id)
            sequence.num_pending += 1
            sequence.sampled_at = place
        return StepPlan(tuple(rows), len(decoding))

    def _row(self, sequence: Sequence, count: int) -> RowPlan:
        start = sequence.num_computed
        end = sequence.num_computed = start + count
        is_pending = end > len(sequence.tokens)
        return RowPlan(
            sequence.request_id,
            UNKNOWN if is_pending else tuple(sequence.tokens[start:end]),
            start,
            sequence.pages,
            sequence.adapter,
            end >= len(sequence.tokens),
            sequence.seat,
            sequence.stay,
            sequence.sampled_at if is_pending else -1,
            sequence.adapted_from,
        )

    def _count_tokens(self, sequence: Sequence, row: RowPlan) -> None:
        if sequence.num_output and len(row.token_ids) == 1:
            self.counters.decode_tokens += 1
        else:
            self.counters.prefill_tokens += len(row.token_ids)
            self.marking.computed(sequence, len(row.token_ids))

    def _commit_row(self, row: RowPlan, sampled: Sampled | None) -> None:
        sequence = self.roster.of_row(row)
        if sequence is None:
            return
        self._count_tokens(sequence, row)
        if sequence.status is SequenceStatus.RUNNING:  # else it lost its pages meanwhile
            self._publish_full_pages(sequence, row.context_len)
        if sampled is not None:
            sequence.num_pending -= 1
            self._commit_token(sequence, sampled)

    def _commit_token(self, sequence: Sequence, sampled: Sampled) -> None:
        if isinstance(sampled, RowFailure):
            self.fail(sequence.request_id, sampled.cause)
            return
        if isinstance(sampled, SamplingFailure | MatchingFailure):
            error = _error_of(sampled, sequence)
            self._outputs.append(StepOutput(sequence.request_id, error=error))
            self.roster.retire(sequence)
            return
        delta = sequence.accept(sampled)
        if sequence.timeline.reads_prompt:
            self.marking.decodes(sequence)
        self.counters.generated_tokens += 1
        self._outputs.append(StepOutput(sequence.request_id, delta))
        if delta.finished is not None:
            self.roster.retire(sequence)

    def _publish_full_pages(self, sequence: Sequence, num_computed: int) -> None:
        size = self.pages.page_size
        keys = sequence.page_keys
        for index in range(len(keys), num_computed // size):
            start = index * size
            key = sequence.chain.key(keys[-1] if keys else None, start, sequence.tokens[start : start + size])
            keys.append(key)
            self.pages.publish(sequence.pages[index], key)

    def _pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.pages.page_size)


def _error_of(failure: SamplingFailure | MatchingFailure, sequence: Sequence) -> GraloraError:
    if isinstance(failure, MatchingFailure):
        return failure.error
    return NumericalError(sequence.request_id, sequence.adapter_name, failure.problem)


def _less_served(started: Sequence | None, waiting: Sequence | None, ledger: Ledger) -> Sequence:
    """Whose tenant was served less; one of the two may be missing. What was started comes first if they are even."""
    if started is None or waiting is None:
        found = started or waiting
        assert found is not None
        return found
    return waiting if ledger.account(waiting.tenant).served < ledger.account(started.tenant).served else started
