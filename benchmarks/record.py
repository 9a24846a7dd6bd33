"""What a run leaves behind: samples, costs and rates, as plain values. Medians and ratios are the report's business."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.cost import Cost, ModelCost
from benchmarks.machine import Rates
from benchmarks.measurement import Contender, Run, mean_decode_step_s, mean_total_s

WHOLE, STEP, FIRST_MEAN, FIRST_LAST = "whole run", "decode step", "first token, mean", "first token, last"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One contender, one measure. Sample i of every contender of a section is from round i, so ratios can be paired."""

    contender: str
    measure: str
    samples_s: list[float]
    requests: int  # in one sample
    tokens: int  # that one sample gave; 0: the measure is a delay
    costs: list[Cost]  # what cannot be avoided
    adapter_bytes: int = 0  # of them, for adapters
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """How many times faster `ours` is than `theirs`, by tokens per second, or by delay where a measure has none."""

    title: str
    ours: str
    theirs: str
    measure: str = WHOLE


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A table of the report. `base`: the contender whose step the others' time for adapters is counted from.

    `rates` are of its own minutes: a machine that is shared is not as fast in all of them.
    """

    key: str
    title: str
    text: str
    rows: list[Row]
    ratios: list[Ratio] = field(default_factory=list)
    base: str = ""
    rates: Rates | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Resident memory that something takes, and how it was found."""

    what: str
    bytes: int
    how: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Skipped:
    """A contender that could not take part."""

    contender: str
    why: str


def rows_of(contender: Contender, rounds: Sequence[Sequence[Run]], cost: ModelCost) -> list[Row]:
    """Every measure that this contender's runs allow."""
    requests = rounds[0][0].requests
    adapter_bytes = 0 if contender.merged else cost.adapter_bytes(requests)

    def row(measure: str, samples_s: list[float], tokens: int, costs: list[Cost]) -> Row:
        return Row(
            contender=contender.name,
            measure=measure,
            samples_s=samples_s,
            requests=len(requests),
            tokens=tokens,
            costs=costs,
            adapter_bytes=adapter_bytes,
            note=contender.note,
        )

    prefill = cost.prefill(requests, merged=contender.merged)
    rows = []
    if requests[0].max_tokens > 1:
        num_tokens = sum(request.max_tokens for request in requests)
        whole = cost.whole(requests, merged=contender.merged)
        rows.append(row(WHOLE, [mean_total_s(runs) for runs in rounds], num_tokens, whole))
    steps = [step for runs in rounds if (step := mean_decode_step_s(runs)) is not None]
    if len(steps) == len(rounds):
        rows.append(row(STEP, steps, len(requests), [cost.decode(requests, merged=contender.merged)]))
    if not contender.one_by_one:
        delays = [runs[0].ttft_s for runs in rounds]
        rows.append(row(FIRST_LAST, [max(delay) for delay in delays], 0, [prefill]))
        if len(requests) > 1:
            rows.append(row(FIRST_MEAN, [sum(delay) / len(delay) for delay in delays], 0, [prefill]))
    return rows
