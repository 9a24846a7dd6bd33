"""The step. Owns the pieces and calls them in order, on a thread that no client and no adapter load touches."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from gralora_runtime.batch import BatchBuilder
from gralora_runtime.model.runner import Runner
from gralora_runtime.observation.steps import Phase, StepObservation
from gralora_runtime.plan import StepPlan
from gralora_runtime.sampler import SampledToken, SamplingFailure, sample
from gralora_runtime.scheduler import Scheduler, StepOutput


def _nothing() -> None:
    pass


class Engine:
    """Plan, build, execute, sample, commit."""

    def __init__(self, scheduler: Scheduler, batch: BatchBuilder, runner: Runner) -> None:
        self.scheduler = scheduler
        self.batch = batch
        self.runner = runner
        self.num_steps = 0
        self.observation = StepObservation()

    def step(self, before_forward: Callable[[], None] = _nothing) -> list[StepOutput]:
        """Compute one step and return what it has to tell the clients.

        `before_forward` is called right before the forward pass, or where that would be if there is nothing to compute.
        """
        timed = self.observation.timed
        plan = timed(Phase.SCHEDULE, self.scheduler.plan)
        if plan is None:
            before_forward()
            return self.scheduler.take_outputs()
        tensors = timed(Phase.BUILD, self.batch.build, plan)
        before_forward()
        logits = timed(Phase.FORWARD, self.runner.execute, tensors)
        sampled = timed(Phase.SAMPLE, self._sample, logits, plan)
        outputs = timed(Phase.COMMIT, self.scheduler.commit, plan, sampled)
        self.num_steps += 1
        self.observation.count(plan)
        return outputs

    def _sample(self, logits: Tensor, plan: StepPlan) -> dict[str, SampledToken | SamplingFailure]:
        ids = [row.request_id for row in plan.rows if row.samples]
        states = [self.scheduler.sequence(request_id).sampler for request_id in ids]
        return dict(zip(ids, sample(logits, states), strict=True))
