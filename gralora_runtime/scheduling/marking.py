"""What the scheduler writes into timelines. A row that decodes costs nothing here: steps are summed up for all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from gralora_runtime.observation.holdups import Hold, Holdups
from gralora_runtime.observation.step_log import StepLog
from gralora_runtime.observation.timeline import Chunk, GivenWay, Line, Mark, Stage
from gralora_runtime.scheduling.fairness import Ledger
from gralora_runtime.scheduling.sequence import Sequence


class Marking:
    """For the engine's thread alone."""

    def __init__(self, ledger: Ledger, now_s: Callable[[], float]) -> None:
        self.steps = StepLog()
        self.holdups = Holdups()
        self._ledger = ledger
        self._now_s = now_s

    def queued(self, sequence: Sequence, running: Iterable[Sequence]) -> None:
        """It waits for a place. `running`: who has them; most of them may be one tenant's."""
        mark = self._waits(sequence, Stage.QUEUE)
        tenants = Counter(one.tenant for one in running)
        for tenant, places in tenants.most_common(1):
            if 2 * places > tenants.total():
                mark.given_way = GivenWay(Hold.PLACE, tenant)

    def gave_way(self, sequence: Sequence, hold: Hold, to: Sequence) -> None:
        """It lost its place, and waits again."""
        self._waits(sequence, Stage.PREEMPTED).given_way = GivenWay(hold, to.tenant)
        sequence.timeline.preemptions += 1

    def resumed(self, sequence: Sequence) -> None:
        """Its client reads on, and it waits for a place again."""
        self._waits(sequence, Stage.QUEUE)

    def paused(self, sequence: Sequence) -> None:
        self._mark(sequence, Stage.PAUSED)

    def started(self, sequence: Sequence) -> None:
        """It got a place, and its prompt is next."""
        self._waits(sequence, Stage.PREFILL)
        self._ledger.start(sequence.tenant)
        sequence.timeline.reads_prompt = True

    def computed(self, sequence: Sequence, tokens: int) -> None:
        """So many tokens of its prompt, in the step that ended last."""
        if sequence.timeline.reads_prompt:
            sequence.timeline.marks[-1].chunks.append(Chunk(tokens, self.steps.last_s))

    def decodes(self, sequence: Sequence) -> None:
        """It has its first token since it got its place."""
        self._mark(sequence, Stage.DECODE)

    def ended(self, sequence: Sequence) -> None:
        self._mark(sequence, Stage.DELIVERY)

    def _waits(self, sequence: Sequence, stage: Stage) -> Mark:
        mark = self._mark(sequence, stage)
        own = self._ledger.account(sequence.tenant).started
        mark.line = Line(self.holdups.until(mark.at_s), self._ledger.num_started, own)
        return mark

    def _mark(self, sequence: Sequence, stage: Stage) -> Mark:
        timeline = sequence.timeline
        last = timeline.marks[-1] if timeline.marks else None
        steps = self.steps.sums
        longest = self.steps.longest(last.steps) if last is not None and last.stage is Stage.DECODE else None
        mark = Mark(stage, self._now_s(), steps, longest)
        timeline.reads_prompt = False
        timeline.marks.append(mark)
        return mark
