"""What somebody who only looks sees of a scheduler's sequences: where each stands, and what keeps the waiting ones.

In any thread, while the engine's goes on: each fact was true a moment ago, and two of them may contradict each other.
"""

from __future__ import annotations

from collections.abc import Sequence as Several

from gralora_runtime.observation.activity import RequestActivity
from gralora_runtime.observation.holdups import Hold
from gralora_runtime.scheduling.scheduler import Scheduler
from gralora_runtime.scheduling.sequence import Sequence, SequenceStatus
from gralora_runtime.scheduling.waiting import place_in_line


def look(scheduler: Scheduler, now_s: float) -> list[RequestActivity]:
    """All sequences, in no order. `now_s`: by the clock that their arrivals are of."""
    everyone = scheduler.roster.every()
    line = _line(scheduler, everyone)
    hold = scheduler.marking.holdups.now or Hold.TURN
    ahead = {sequence.request_id: place for place, sequence in enumerate(line)}
    return [
        RequestActivity(
            request_id=sequence.request_id,
            tenant=sequence.tenant,
            adapter=sequence.adapter_name,
            version=sequence.lease.version,
            stage=sequence.timeline.marks[-1].stage,
            age_s=now_s - sequence.arrival_s,
            prompt_tokens=sequence.num_prompt,
            computed_tokens=sequence.num_computed,
            output_tokens=sequence.num_output,
            max_tokens=sequence.max_tokens,
            preemptions=sequence.preemptions,
            hold=hold if sequence.request_id in ahead else None,
            ahead=ahead.get(sequence.request_id, 0),
        )
        for sequence in everyone
    ]


def _line(scheduler: Scheduler, everyone: Several[Sequence]) -> list[Sequence]:
    """Who waits, in the order in which they would be served as things are."""
    accounts = scheduler.ledger.tenants()
    waiting = [one for one in everyone if one.status is SequenceStatus.WAITING and one.tenant in accounts]
    return sorted(waiting, key=lambda one: (accounts[one.tenant].served, place_in_line(one)))
