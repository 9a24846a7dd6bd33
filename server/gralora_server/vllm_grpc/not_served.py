"""What a request of this protocol may not ask for, as this server does not do it: refused, and never passed over."""

from __future__ import annotations

from collections.abc import Callable, Sized

from gralora.foreign import vllm_pb2
from gralora_runtime.errors import InvalidRequestError

NOT_SERVED = "is nothing that this server does: leave it out"

Request = vllm_pb2.GenerateRequest


def check_served(request: Request) -> None:
    """Raises InvalidRequestError naming the field."""
    for field, asked in _FIELDS:
        if value := asked(request):
            raise InvalidRequestError(field, value, NOT_SERVED)


def _more_than_one(request: Request) -> object:
    return request.sampling.num_sequences if request.sampling.num_sequences > 1 else 0


def _with_special_tokens(request: Request) -> str:
    response = request.response
    return "false" if response.HasField("skip_special_tokens") and not response.skip_special_tokens else ""


def _entries(of: Sized) -> str:
    return f"{len(of)} entries" if of else ""


# What each says, if that asks for anything.
_FIELDS: tuple[tuple[str, Callable[[Request], object]], ...] = (
    ("sampling.num_sequences", _more_than_one),
    ("truncate_prompt_tokens", lambda request: request.truncate_prompt_tokens),
    ("media", lambda request: _entries(request.media)),
    ("decoding.allowed_token_ids", lambda request: _entries(request.decoding.allowed_token_ids)),
    (
        "decoding.structural_tag",
        lambda request: request.decoding.HasField("structural_tag") and (request.decoding.structural_tag or "empty"),
    ),
    ("stopping.include_stop_strings", lambda request: request.stopping.include_stop_strings),
    ("response.prompt_logprobs", lambda request: request.response.prompt_logprobs),
    ("response.prompt_candidates", lambda request: request.response.HasField("prompt_candidates")),
    ("response.output_candidates.token_ids", lambda request: request.response.output_candidates.HasField("token_ids")),
    ("response.output_candidates.all", lambda request: request.response.output_candidates.HasField("all")),
    ("response.skip_special_tokens", _with_special_tokens),
    ("kv.bypass_prefix_cache", lambda request: request.kv.bypass_prefix_cache),
    ("kv.cache_salt", lambda request: request.kv.cache_salt),
    ("kv.kv_transfer_params", lambda request: request.kv.HasField("kv_transfer_params")),
    ("kv.ec_transfer_params", lambda request: request.kv.HasField("ec_transfer_params")),
)
