"""What cost a request most, and what would have helped, in a sentence each. Reads a waterfall, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum

from gralora_runtime.observation.adapter_way import Station
from gralora_runtime.observation.holdups import Hold
from gralora_runtime.observation.timeline import Stage
from gralora_runtime.observation.waterfall import Part, Waterfall

SLOW_DISK_BYTES_S = 50e6  # of what is read, checked and packed
SLOW_DISK_S = 0.25  # less than that is no disk's fault
MOST = 0.6  # of the time for an adapter: then it was that, and not that it was cold
OTHERS = "another tenant"  # for those who may not know its name


class Cause(StrEnum):
    """What a request's time went to."""

    TOKENIZING = "tokenizing"
    GRAMMAR = "grammar"
    ADAPTER_SOURCE = "adapter_source"
    ADAPTER_LINE = "adapter_line"
    SLOW_DISK = "slow_disk"
    FULL_POOL = "full_pool"
    ADAPTER_TRIAL = "adapter_trial"
    COLD_ADAPTER = "cold_adapter"
    FLOOD = "flood"
    PLACES = "places"
    PAGES = "pages"
    TURN = "turn"
    PROMPT = "prompt"
    ANSWER = "answer"
    NEIGHBOUR_PROMPT = "neighbour_prompt"
    PREEMPTION = "preemption"
    SLOW_READER = "slow_reader"


@dataclass(frozen=True, slots=True)
class Verdict:
    """`cost_s` of the request's whole time went to `cause`."""

    cause: Cause
    cost_s: float
    says: str
    advice: str


# What the time went to, and what would have helped. Of a waterfall and the cause's own part.
SAYS: dict[Cause, tuple[str, str]] = {
    Cause.TOKENIZING: ("turning its prompt into tokens", "A shorter prompt, or sending token ids."),
    Cause.GRAMMAR: (
        "compiling what its answer has to match",
        "A simpler schema or grammar, or the same one again: it is compiled once and kept.",
    ),
    Cause.ADAPTER_SOURCE: (
        "finding adapter {adapter} in its sources",
        "Loading or pinning it ahead of its first request (gralora adapters load).",
    ),
    Cause.ADAPTER_LINE: (
        "standing in line behind other adapters that were read first",
        "Pinning {adapter}, or fewer different adapters at a time.",
    ),
    Cause.SLOW_DISK: (
        "reading adapter {adapter} at {rate} ({size}), from a slow disk or beside busy cores",
        "A faster disk, more memory behind the pool (--host-cache-bytes), or pinning it.",
    ),
    Cause.FULL_POOL: (
        "waiting for room for adapter {adapter} in a full pool",
        "A larger pool (--adapter-pool-bytes), or fewer pinned adapters.",
    ),
    Cause.ADAPTER_TRIAL: (
        "the trial of adapter {adapter}, which had to answer its golden prompts first",
        "Loading a new version ahead of its first request (gralora adapters load), or fewer golden prompts.",
    ),
    Cause.COLD_ADAPTER: (
        "bringing adapter {adapter} into memory, as it was cold",
        "Pinning it, a larger pool (--adapter-pool-bytes) or more memory behind it (--host-cache-bytes).",
    ),
    Cause.FLOOD: (
        "waiting behind requests of {whom}, which had most places ({ahead} more of other tenants got one first)",
        "A larger weight for its tenant, a limit for the other one (limits.queued_requests), or another replica.",
    ),
    Cause.PLACES: (
        "waiting for a place in the steps, all of which were taken",
        "More places (--max-num-seqs), shorter answers, or another replica.",
    ),
    Cause.PAGES: (
        "waiting for pages of the KV cache",
        "A larger KV cache (--kv-cache-bytes), or fewer long prompts at a time.",
    ),
    Cause.TURN: (
        "waiting for its turn beside the prompts of others",
        "More tokens in a step (--max-num-batched-tokens), fewer requests at a time, or another replica.",
    ),
    Cause.PROMPT: (
        "computing its own prompt ({prompt} tokens, of which {cached} were there already)",
        "A shorter prompt, or one that begins as others do, which the prefix cache keeps.",
    ),
    Cause.ANSWER: (
        "computing its own answer ({output} tokens, {step} each, {rows} requests in a step)",
        "Fewer tokens (max_tokens), or fewer requests at a time.",
    ),
    Cause.NEIGHBOUR_PROMPT: (
        "long prompts of others in its steps (its longest pause: {gap}, beside {neighbour} tokens of {whose})",
        "A smaller --max-num-batched-tokens, which makes such steps shorter.",
    ),
    Cause.PREEMPTION: (
        "giving way: it lost its {hold} to {whom} and was computed again",
        "A larger KV cache (--kv-cache-bytes), fewer places (--max-num-seqs), or a larger weight for its tenant.",
    ),
    Cause.SLOW_READER: (
        "its client, which read more slowly than it was answered",
        "A client that reads on at once, or fewer and larger messages (min_tokens_per_message).",
    ),
}
HOLDS = {Hold.PLACE: "place", Hold.PAGES: "pages of the KV cache", Hold.TURN: "turn"}
CAUSE_OF_HOLD = {Hold.PLACE: Cause.PLACES, Hold.PAGES: Cause.PAGES, Hold.TURN: Cause.TURN}
CAUSE_OF_STATION = {
    Station.FIND: Cause.ADAPTER_SOURCE,
    Station.LINE: Cause.ADAPTER_LINE,
    Station.ROOM: Cause.FULL_POOL,
    Station.TRIAL: Cause.ADAPTER_TRIAL,
}


def verdict(found: Waterfall, name_of: Callable[[str], str] = str) -> Verdict:
    """`name_of` a tenant, for whoever is told: another's may be none of his business."""
    costs: dict[Cause, float] = {}
    for cause, seconds in _costs(found):
        costs[cause] = costs.get(cause, 0.0) + seconds
    cause = max(costs, key=lambda one: costs[one], default=Cause.ANSWER)
    cost_s = costs.get(cause, 0.0)
    what, advice = SAYS[cause]
    facts = _facts(found, cause, name_of)
    says = f"{shown_s(cost_s)} of {shown_s(found.total_s)} went to {what.format(**facts)}."
    return Verdict(cause, cost_s, says, advice.format(**facts))


def _costs(found: Waterfall) -> Iterator[tuple[Cause, float]]:
    yield from _costs_of_adapter([part for part in found.parts if part.stage is Stage.ADAPTER])
    again = Cause.PROMPT  # why a prompt is computed
    for part in found.parts:
        if part.stage is Stage.TOKENIZE:
            yield Cause.TOKENIZING, part.duration_s
        elif part.stage is Stage.GRAMMAR:
            yield Cause.GRAMMAR, part.duration_s
        elif part.stage is Stage.QUEUE:
            yield from _costs_of_queue(part, found.tenant)
        elif part.stage is Stage.PREFILL:
            computed_s = min(part.duration_s, sum(chunk.step_s for chunk in part.chunks))
            yield again, computed_s
            yield Cause.TURN, part.duration_s - computed_s
        elif part.stage is Stage.DECODE:
            yield from _costs_of_decoding(part)
        elif part.stage is Stage.PREEMPTED:
            again = Cause.PREEMPTION
            yield again, part.duration_s
        elif part.stage in (Stage.PAUSED, Stage.DELIVERY):
            again = Cause.SLOW_READER
            yield again, part.duration_s


def _costs_of_adapter(parts: list[Part]) -> Iterator[tuple[Cause, float]]:
    whole_s = sum(part.duration_s for part in parts)
    cause = Cause.COLD_ADAPTER
    for part in parts:
        if part.station is not None and part.duration_s > MOST * whole_s:
            is_slow = part.station is Station.READ and _is_slow(part)
            cause = Cause.SLOW_DISK if is_slow else CAUSE_OF_STATION.get(part.station, cause)
    yield cause, whole_s


def _is_slow(part: Part) -> bool:
    return part.duration_s >= SLOW_DISK_S and part.num_bytes < SLOW_DISK_BYTES_S * part.duration_s


def _costs_of_queue(part: Part, tenant: str) -> Iterator[tuple[Cause, float]]:
    if part.own_ahead <= part.ahead and part.given_way is not None and part.given_way.to != tenant:
        yield Cause.FLOOD, part.duration_s
        return
    for hold, seconds in part.held_s.items():
        yield CAUSE_OF_HOLD[hold], seconds
    yield Cause.TURN, max(0.0, part.duration_s - sum(part.held_s.values()))


def _costs_of_decoding(part: Part) -> Iterator[tuple[Cause, float]]:
    """Of steps that computed prompts, what they took beyond the others; with no others, what its tokens' share was."""
    steps = part.steps
    plain = steps.steps - steps.mixed_steps
    share = steps.rows / max(1, steps.rows + steps.prompt_tokens)
    each_s = (steps.seconds - steps.mixed_s) / plain if plain else share * steps.mixed_s / max(1, steps.mixed_steps)
    prompts_s = max(0.0, steps.mixed_s - steps.mixed_steps * each_s)
    yield Cause.NEIGHBOUR_PROMPT, prompts_s
    yield Cause.ANSWER, part.duration_s - prompts_s


def _facts(found: Waterfall, cause: Cause, name_of: Callable[[str], str]) -> dict[str, object]:
    decoding = [part for part in found.parts if part.stage is Stage.DECODE]
    queued = [part for part in found.parts if part.stage is Stage.QUEUE]
    read = next((part for part in found.parts if part.station is Station.READ), None)
    gaps = [part.longest for part in decoding if part.longest is not None]
    longest = max(gaps, key=lambda step: step.gap_s, default=None)
    steps = sum(part.steps.steps for part in decoding)
    waited = Stage.PREEMPTED if cause is Cause.PREEMPTION else Stage.QUEUE
    given_way = next((p.given_way for p in found.parts if p.stage is waited and p.given_way is not None), None)
    return {
        "adapter": found.adapter or "(none)",
        "prompt": found.prompt_tokens,
        "cached": found.cached_tokens,
        "output": found.output_tokens,
        "step": shown_s(sum(part.duration_s for part in decoding) / max(1, steps)),
        "rows": f"{sum(part.steps.rows for part in decoding) / max(1, steps):.1f}",
        "ahead": sum(part.ahead for part in queued),
        "whom": name_of(given_way.to) if given_way is not None and given_way.to != found.tenant else OTHERS,
        "hold": HOLDS[given_way.hold] if given_way is not None else HOLDS[Hold.PLACE],
        "gap": shown_s(longest.gap_s if longest is not None else 0.0),
        "neighbour": longest.prompt_tokens if longest is not None else 0,
        "whose": name_of(longest.prompt_of) if longest is not None else OTHERS,
        "size": f"{read.num_bytes / 1e6:.1f} MB" if read is not None else "0 MB",
        "rate": f"{read.num_bytes / 1e6 / max(read.duration_s, 1e-9):.1f} MB/s" if read is not None else "0 MB/s",
    }


def shown_s(seconds: float) -> str:
    """ "1.24 s", "38 ms", "0.4 ms"."""
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1000:.0f} ms" if seconds >= 0.01 else f"{seconds * 1000:.1f} ms"
