"""How long steps took and what was in them, so that any stretch of them can be told later: running sums, and those of
the longest that no later one has exceeded. A step costs the same however many rows it has. A leaf but for the plan."""

from __future__ import annotations

from bisect import bisect_left
from typing import NamedTuple

from gralora_runtime.plan import StepPlan

MAX_LONGEST = 1024  # a run of steps, each shorter than the one before, is no longer in practice


class StepSums(NamedTuple):
    """Of all steps since the start. Two of them, subtracted, are a stretch's."""

    steps: int = 0
    seconds: float = 0.0  # that they took
    rows: int = 0  # of requests
    mixed_steps: int = 0  # that computed prompts, too
    mixed_s: float = 0.0
    prompt_tokens: int = 0  # in those

    def since(self, before: StepSums) -> StepSums:
        return StepSums(
            self.steps - before.steps,
            self.seconds - before.seconds,
            self.rows - before.rows,
            self.mixed_steps - before.mixed_steps,
            self.mixed_s - before.mixed_s,
            self.prompt_tokens - before.prompt_tokens,
        )


class LongStep(NamedTuple):
    """One step, and why it may have been long."""

    number: int
    gap_s: float  # from the step before's results to its own: what lies between two tokens of a row that decodes
    rows: int
    prompt_tokens: int
    prompt_of: str  # the request with most of those; "": nobody


NOTHING = StepSums()


class StepLog:
    """Written by the engine's thread. `sums` is replaced as a whole, so that any thread may read it."""

    def __init__(self) -> None:
        self.sums = NOTHING
        self.last_s = 0.0  # of the last step
        self._ended_s = 0.0
        # Gaps fall from one to the next: who is behind a longer one is the longest since.
        self._numbers: list[int] = []
        self._longest: list[LongStep] = []

    def note(self, plan: StepPlan, began_s: float, ended_s: float) -> None:
        """A step was computed. Pipelined, it stood behind the one before."""
        before = self.sums
        prompts = plan.rows[plan.num_decode_rows :]
        tokens = sum(len(row.token_ids) for row in prompts)
        self.last_s = ended_s - max(began_s, self._ended_s)
        mixed = bool(prompts)
        self.sums = StepSums(
            before.steps + 1,
            before.seconds + self.last_s,
            before.rows + len(plan.rows),
            before.mixed_steps + mixed,
            before.mixed_s + self.last_s * mixed,
            before.prompt_tokens + tokens,
        )
        largest = max(prompts, key=lambda row: len(row.token_ids)).request_id if prompts else ""
        self._keep(LongStep(before.steps, ended_s - self._ended_s, len(plan.rows), tokens, largest))
        self._ended_s = ended_s

    def longest(self, since: StepSums) -> LongStep | None:
        """Of the steps that came after those sums, the one with the longest gap. For the engine's thread."""
        at = bisect_left(self._numbers, since.steps)
        return self._longest[at] if at < len(self._longest) else None

    def _keep(self, step: LongStep) -> None:
        while self._longest and self._longest[-1].gap_s <= step.gap_s:
            self._longest.pop()
            self._numbers.pop()
        self._longest.append(step)
        self._numbers.append(step.number)
        if len(self._longest) > MAX_LONGEST:
            del self._longest[0], self._numbers[0]
