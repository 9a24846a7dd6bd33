"""The step. Owns the pieces and calls them in order, on a thread that no client and no adapter load touches."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from gralora_runtime.failure import contained
from gralora_runtime.model.programs.runner import Runner
from gralora_runtime.observation.steps import Phase, StepObservation
from gralora_runtime.plan import StepPlan
from gralora_runtime.sampling.host import sample
from gralora_runtime.sampling.outcome import Sampled
from gralora_runtime.scheduler import Scheduler, StepOutput
from gralora_runtime.stepping.batch import BatchBuilder

MAX_FAILURES_IN_A_ROW = 3  # of steps: then it is not the requests that are at fault


def _nothing() -> None:
    pass


class Engine:
    """Plan, build, execute, sample, commit."""

    def __init__(self, scheduler: Scheduler, batch: BatchBuilder, runner: Runner) -> None:
        self.scheduler = scheduler
        self.batch = batch
        self.runner = runner
        self.num_steps = 0
        self._failures_in_a_row = 0
        self.observation = StepObservation()

    @property
    def is_failing(self) -> bool:
        """Too many steps failed one after the other: there is no point in going on."""
        return self._failures_in_a_row >= MAX_FAILURES_IN_A_ROW

    def step(self, before_forward: Callable[[], None] = _nothing) -> list[StepOutput]:
        """Compute one step and return what it has to tell the clients.

        `before_forward` is called right before the forward pass, or where that would be if there is nothing to compute.
        An exception of what all rows share ends the rows of this step, with `StepFailedError`, and nobody else.
        """
        plan: StepPlan | None = None
        timed = self.observation.timed
        try:
            plan = timed(Phase.SCHEDULE, self.scheduler.plan)
            if plan is None:
                before_forward()
                return self.scheduler.take_outputs()
            tensors = timed(Phase.BUILD, self.batch.build, plan)
            before_forward()
            logits = timed(Phase.FORWARD, self.runner.execute, tensors)
            sampled = timed(Phase.SAMPLE, self._sample, logits, plan)
            outputs = timed(Phase.COMMIT, self.scheduler.commit, plan, sampled)
        except BaseException as error:
            if not contained(error):
                raise
            self._failures_in_a_row += 1
            self.scheduler.fail_step(plan, error)
            return self.scheduler.take_outputs()
        self._failures_in_a_row = 0
        self.num_steps += 1
        self.observation.count(plan)
        return outputs

    def _sample(self, logits: Tensor, plan: StepPlan) -> dict[str, Sampled]:
        ids = [row.request_id for row in plan.rows if row.samples]
        states = [self.scheduler.sequence(request_id).sampler for request_id in ids]
        return dict(zip(ids, sample(logits, states), strict=True))
