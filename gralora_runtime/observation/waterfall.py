"""A timeline as parts that follow one another without a gap: what a request spent its time on. Plain values."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

from gralora_runtime.observation.adapter_way import AdapterWay, Station
from gralora_runtime.observation.holdups import Hold
from gralora_runtime.observation.step_log import NOTHING, LongStep, StepSums
from gralora_runtime.observation.timeline import Chunk, GivenWay, Line, Mark, Stage, Timeline


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A stretch of a request's time. What does not concern its stage is empty."""

    stage: Stage
    start_s: float  # since the request was received
    duration_s: float
    station: Station | None = None  # of an adapter that is loaded
    num_bytes: int = 0  # of that adapter
    held_s: Mapping[Hold, float] = field(default_factory=dict)  # what whoever came next waited for, meanwhile
    ahead: int = 0  # requests of other tenants that got a place meanwhile
    own_ahead: int = 0  # of its own tenant
    given_way: GivenWay | None = None
    chunks: tuple[Chunk, ...] = ()
    steps: StepSums = NOTHING  # of decoding
    longest: LongStep | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Waterfall:
    """The parts' durations add up to `total_s`: from when it was received until its call had ended, or now."""

    request_id: str
    tenant: str
    adapter: str  # and its version, once one serves it
    received_at: float  # seconds since the epoch
    total_s: float
    outcome: str  # "": it has not ended
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    preemptions: int
    first_token_s: float | None
    parts: tuple[Part, ...]

    def time_of(self, *stages: Stage) -> float:
        """In seconds."""
        return sum(part.duration_s for part in self.parts if part.stage in stages)


def waterfall(timeline: Timeline) -> Waterfall:
    """As far as it has come. From any thread."""
    left_s, ended_s = timeline.left_s, timeline.ended_s
    marks = timeline.marks.copy()
    until_s = time.monotonic() if ended_s is None else max(ended_s, left_s or 0.0)
    if ended_s is not None and marks[-1].stage is not Stage.DELIVERY:  # it ended before it was the scheduler's
        marks.append(Mark(Stage.DELIVERY, ended_s))
    parts = tuple(_parts(timeline, marks, max(until_s, marks[-1].at_s)))
    return Waterfall(
        request_id=timeline.request_id,
        tenant=timeline.tenant,
        adapter=timeline.served_by or timeline.asked_for,
        received_at=timeline.received_at,
        total_s=sum(part.duration_s for part in parts),
        outcome=timeline.outcome,
        prompt_tokens=timeline.prompt_tokens,
        cached_tokens=timeline.cached_tokens,
        output_tokens=timeline.output_tokens,
        preemptions=timeline.preemptions,
        first_token_s=timeline.first_token_s,
        parts=parts,
    )


def _parts(timeline: Timeline, marks: list[Mark], until_s: float) -> Iterator[Part]:
    """Of two marks of one stage the second says more, and what lies between is in both of theirs."""
    start_s = timeline.received_s
    for mark, after in pairwise([*marks, None]):
        assert mark is not None
        end_s = until_s if after is None else max(after.at_s, start_s)
        if after is not None and after.stage is mark.stage:
            continue
        if mark.stage is Stage.ADAPTER and timeline.adapter.way is not None:
            yield from _on_the_way(timeline, timeline.adapter.way, start_s, end_s)
        else:
            yield _part(timeline, mark, after, start_s, end_s)
        start_s = end_s


def _part(timeline: Timeline, mark: Mark, after: Mark | None, start_s: float, end_s: float) -> Part:
    is_decoding = mark.stage is Stage.DECODE and after is not None
    waited = _between(mark.line, after.line) if after is not None else Line({}, 0, 0)
    return Part(
        stage=mark.stage,
        start_s=start_s - timeline.received_s,
        duration_s=end_s - start_s,
        held_s=waited.held,
        ahead=waited.started - waited.own,
        own_ahead=waited.own,
        given_way=mark.given_way,
        chunks=tuple(mark.chunks),
        steps=after.steps.since(mark.steps) if is_decoding and after is not None else NOTHING,
        longest=after.longest if is_decoding and after is not None else None,
    )


def _between(before: Line | None, after: Line | None) -> Line:
    if before is None or after is None:
        return Line({}, 0, 0)
    held = {hold: after.held[hold] - seconds for hold, seconds in before.held.items()}
    return Line(held, after.started - before.started, after.own - before.own)


def _on_the_way(timeline: Timeline, way: AdapterWay, start_s: float, end_s: float) -> Iterator[Part]:
    """What was done about the adapter while this request waited. Before anything was, somebody looked for it."""
    marks = [(Station.FIND, start_s)]
    marks += [(station, min(max(at_s, start_s), end_s)) for station, at_s in way.marks.copy()]
    for (station, began_s), (_, next_s) in pairwise([*marks, (None, end_s)]):
        if next_s > began_s and station is not None:
            yield Part(
                stage=Stage.ADAPTER,
                station=station,
                num_bytes=way.num_bytes,
                start_s=began_s - timeline.received_s,
                duration_s=next_s - began_s,
            )
