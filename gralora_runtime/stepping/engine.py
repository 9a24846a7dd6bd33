"""The step. Owns the pieces and calls them in order, on a thread that no client and no adapter load touches.

Pipelined, a step is planned, built and launched while the one before runs, and only then is that one waited for: the
device goes from one to the next without the host.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

from gralora_runtime.failure import contained
from gralora_runtime.observation.step_times import StepTimes
from gralora_runtime.observation.steps import Phase, StepObservation
from gralora_runtime.plan import StepPlan
from gralora_runtime.scheduling.scheduler import Scheduler, StepOutput
from gralora_runtime.shortage import out_of_memory
from gralora_runtime.stepping.batch import BatchBuilder
from gralora_runtime.stepping.executor import Executor, Launched
from gralora_runtime.stepping.fence import StepFence

MAX_FAILURES_IN_A_ROW = 3  # of steps: then it is not the requests that are at fault


class _OnItsWay(NamedTuple):
    plan: StepPlan
    launched: Launched
    began_s: float


def _nothing() -> None:
    pass


class Engine:
    """Plan, build, launch; wait, commit."""

    def __init__(
        self,
        scheduler: Scheduler,
        batch: BatchBuilder,
        executor: Executor,
        observation: StepObservation,
        fence: StepFence,
        *,
        pipelined: bool = False,
    ) -> None:
        self.scheduler = scheduler
        self.batch = batch
        self.executor = executor
        self.observation = observation
        self.pipelined = pipelined
        self.times = StepTimes()
        self._ended_s = 0.0  # when the last step's results came
        self._fence = fence
        self.num_steps = 0
        self._before: _OnItsWay | None = None  # launched, and not waited for yet
        self._failures_in_a_row = 0

    @property
    def is_failing(self) -> bool:
        """Too many steps failed one after the other: there is no point in going on."""
        return self._failures_in_a_row >= MAX_FAILURES_IN_A_ROW

    @property
    def has_work(self) -> bool:
        """Something is to be computed, or is being."""
        return self.scheduler.has_work or self._before is not None

    def step(self, before_waiting: Callable[[], None] = _nothing) -> list[StepOutput]:
        """Launch a step, wait for the oldest on its way, and return what there is to tell the clients.

        `before_waiting` is called in between. An exception of what all rows of a step share ends these, with
        `StepFailedError`, and nobody else.
        """
        launched = self._launch()
        before_waiting()
        due = launched
        if self.pipelined:
            due, self._before = self._before, launched
        return self._finish(due)

    def finish(self) -> list[StepOutput]:
        """Wait for what is on its way, and launch nothing more."""
        due, self._before = self._before, None
        return self._finish(due)

    def close(self) -> None:
        """Drop what is on its way, and end every sequence without a word."""
        self.executor.close()
        self._before = None
        self._fence.clear()
        self.scheduler.abandon_all()

    def _launch(self) -> _OnItsWay | None:
        plan: StepPlan | None = None
        began_s = time.perf_counter()
        timed = self.observation.timed
        try:
            plan = timed(Phase.SCHEDULE, self.scheduler.plan)
            if plan is None:
                return None
            tensors = timed(Phase.BUILD, self.batch.build, plan)
            sampling = [row for row in plan.rows if row.samples]
            states = [self.scheduler.sequence(row.request_id).sampler for row in sampling]
            launched = self.executor.launch(tensors, states, [row.seat for row in sampling])
        except BaseException as error:
            # What was launched before is waited for before the next plan, so that this one can be made anew.
            self._fail(plan, error, repeatable=True)
            return None
        self._fence.launched()
        return _OnItsWay(plan, launched, began_s)

    def _finish(self, due: _OnItsWay | None) -> list[StepOutput]:
        if due is None:
            return self.scheduler.take_outputs()
        try:
            try:
                sampled = due.launched.wait()
            finally:
                self._fence.returned()
            self.scheduler.marking.steps.note(due.plan, due.began_s, time.perf_counter())
            outputs = self.observation.timed(Phase.COMMIT, self.scheduler.commit, due.plan, sampled)
        except BaseException as error:
            self._fail(due.plan, error, repeatable=not self.pipelined)
            return self.scheduler.take_outputs()
        self._failures_in_a_row = 0
        self.num_steps += 1
        # Pipelined, it stood behind the one before.
        now_s = time.perf_counter()
        self.times.observe(due.plan, now_s - max(due.began_s, self._ended_s))
        self._ended_s = now_s
        self.observation.count(due.plan)
        return outputs

    def _fail(self, plan: StepPlan | None, error: BaseException, *, repeatable: bool) -> None:
        if not contained(error):
            raise error
        if plan is not None and out_of_memory(error):  # too much at once: no reason to end the engine
            if repeatable:
                self.scheduler.shed(plan, error)
            else:
                self.scheduler.fail_step(plan, error)
        elif self.scheduler.fail_step(plan, error):
            self._failures_in_a_row += 1
