"""What spans say of a request: by the semantic conventions for generative AI, and beyond them by names of ours."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from gralora_runtime.observation.waterfall import Part, Waterfall
from gralora_runtime.request import GenerationRequest

Attributes = Mapping[str, str | bool | int | float | tuple[str, ...]]

SYSTEM = "gralora"
WHOLE = ("stop", "length")  # outcomes that are no error


def operation_of(asked: GenerationRequest) -> str:
    return "chat" if asked.prompt.messages is not None else "text_completion"


def of_request(asked: GenerationRequest, found: Waterfall, request_id: str, base_model: str) -> Attributes:
    """Neither prompt nor answer: those are nobody's but the client's."""
    said: dict[str, str | bool | int | float | tuple[str, ...]] = {
        "gen_ai.operation.name": operation_of(asked),
        "gen_ai.provider.name": SYSTEM,
        "gen_ai.request.model": "+".join(asked.named_adapters) or base_model,
        "gen_ai.response.model": found.adapter or base_model,
        "gen_ai.response.id": request_id,
        "gen_ai.request.temperature": asked.sampling.temperature,
        "gen_ai.request.top_p": asked.sampling.top_p,
        "gen_ai.usage.input_tokens": found.prompt_tokens,
        "gen_ai.usage.output_tokens": found.output_tokens,
        "gen_ai.usage.cache_read.input_tokens": found.cached_tokens,
        "gen_ai.response.finish_reasons": (found.outcome or "cancelled",),
        "gralora.request_id": request_id,
        "gralora.tenant": asked.tenant,
        "gralora.preemptions": found.preemptions,
    }
    if asked.stopping.max_tokens is not None:
        said["gen_ai.request.max_tokens"] = asked.stopping.max_tokens
    if found.first_token_s is not None:
        said["gralora.first_token_s"] = found.first_token_s
    if found.outcome not in WHOLE:
        said["error.type"] = found.outcome or "cancelled"
    return said


def name_of(part: Part) -> str:
    return part.stage.value if part.station is None else f"{part.stage.value} {part.station.value}"


def of_part(part: Part) -> Attributes:
    return dict(_facts(part))


def _facts(part: Part) -> Iterator[tuple[str, int | float]]:
    if part.num_bytes:
        yield "gralora.adapter.bytes", part.num_bytes
    for hold, seconds in part.held_s.items():
        if seconds > 0:
            yield f"gralora.queue.{hold.value}_s", seconds
    if part.chunks:
        yield "gralora.prefill.tokens", sum(chunk.tokens for chunk in part.chunks)
        yield "gralora.prefill.chunks", len(part.chunks)
    if part.steps.steps:
        yield "gralora.decode.steps", part.steps.steps
        yield "gralora.decode.mean_rows", part.steps.rows / part.steps.steps
        yield "gralora.decode.prompt_steps", part.steps.mixed_steps
    if part.longest is not None:
        yield "gralora.decode.longest_pause_s", part.longest.gap_s
