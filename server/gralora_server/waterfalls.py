"""A request's timeline as a message, for whoever asks: others' names are none of a tenant's business."""

from __future__ import annotations

from collections.abc import Callable

from gralora.v1 import server_pb2
from gralora_runtime.observation.timeline import Timeline
from gralora_runtime.observation.verdict import verdict
from gralora_runtime.observation.waterfall import Part, waterfall


def to_explanation(
    timeline: Timeline | None, request_id: str, shown: Callable[[str], str]
) -> server_pb2.ExplainRequestResponse:
    """`request_id`: as its tenant calls it. `shown`: what is told where somebody else is named."""
    if timeline is None:
        return server_pb2.ExplainRequestResponse()
    found = waterfall(timeline)
    why = verdict(found, shown)
    explanation = server_pb2.RequestExplanation(
        request_id=request_id,
        tenant=found.tenant,
        adapter=found.adapter,
        total_s=found.total_s,
        outcome=found.outcome,
        prompt_tokens=found.prompt_tokens,
        cached_tokens=found.cached_tokens,
        output_tokens=found.output_tokens,
        preemptions=found.preemptions,
        first_token_s=found.first_token_s,
        parts=[_to_part(part, shown) for part in found.parts],
        cause=why.cause.value,
        says=why.says,
        advice=why.advice,
    )
    explanation.received.FromNanoseconds(int(found.received_at * 1e9))
    return server_pb2.ExplainRequestResponse(explanation=explanation)


def _to_part(part: Part, shown: Callable[[str], str]) -> server_pb2.TimelinePart:
    longest = part.longest
    return server_pb2.TimelinePart(
        stage=part.stage.value,
        station=part.station.value if part.station is not None else "",
        start_s=part.start_s,
        duration_s=part.duration_s,
        num_bytes=part.num_bytes,
        held_up=[server_pb2.HeldUp(by=hold.value, duration_s=s) for hold, s in part.held_s.items() if s > 0],
        ahead=part.ahead,
        own_ahead=part.own_ahead,
        lacks=part.given_way.hold.value if part.given_way is not None else "",
        lacks_for=shown(part.given_way.to) if part.given_way is not None else "",
        chunks=[server_pb2.PromptChunk(tokens=chunk.tokens, step_s=chunk.step_s) for chunk in part.chunks],
        steps=part.steps.steps,
        mean_rows=part.steps.rows / part.steps.steps if part.steps.steps else 0.0,
        prompt_steps=part.steps.mixed_steps,
        prompt_steps_s=part.steps.mixed_s,
        longest_pause=server_pb2.LongestPause(
            duration_s=longest.gap_s,
            rows=longest.rows,
            prompt_tokens=longest.prompt_tokens,
            prompt_of=shown(longest.prompt_of),
        )
        if longest is not None
        else None,
    )
