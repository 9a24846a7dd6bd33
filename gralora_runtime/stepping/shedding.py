"""What of a step that ran out of memory goes on: the older half of its requests. Knows no tensors."""

from __future__ import annotations

from dataclasses import replace

from gralora_runtime.plan import StepPlan
from gralora_runtime.scheduling.scheduler import Scheduler


def shed(scheduler: Scheduler, plan: StepPlan, error: BaseException) -> None:
    """End the younger half, one at least, and let the others' rows be planned anew.

    For a step of which nothing has been taken in, and on which no other one follows.
    """
    rows = sorted(plan.rows, key=lambda row: row.stay)  # in order of admission
    num_kept = len(rows) // 2
    scheduler.fail_step(replace(plan, rows=tuple(rows[num_kept:])), error)
    for row in rows[:num_kept]:
        sequence = scheduler.sequence(row.request_id)
        sequence.num_computed = row.start
        sequence.num_pending -= int(row.samples)
