"""What a request asks for, checked against the model and made into what follows it token by token."""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from tokenizers import Tokenizer

from gralora_runtime.detokenizer import Detokenizer
from gralora_runtime.errors import InvalidRequestError
from gralora_runtime.info import EngineInfo
from gralora_runtime.model.loading import BaseModel
from gralora_runtime.request import GenerationRequest
from gralora_runtime.sampling.state import SamplerState
from gralora_runtime.structured.matcher import Compiled, Matcher


@dataclass(frozen=True, slots=True)
class Rules:
    """Of one request."""

    max_tokens: int
    seed: int
    sampler: SamplerState
    detokenizer: Detokenizer


def check_fits(request: GenerationRequest, info: EngineInfo) -> None:
    """What no prompt could make right. Raises InvalidRequestError."""
    wanted = request.stopping.max_tokens
    if wanted is not None and wanted >= info.max_model_len:
        problem = f"must be less than {info.max_model_len}, which prompt and output have together at most"
        raise InvalidRequestError("stopping.max_tokens", wanted, problem)


def rules_of(
    request: GenerationRequest,
    tokens: list[int],
    base: BaseModel,
    info: EngineInfo,
    compiled: Compiled | None = None,
    *,
    added_tokens: int = 0,
    tokenizer: Tokenizer | None = None,
) -> Rules:
    """`tokens`: of the prompt; `compiled`: what the answer has to match; `added_tokens`: behind the base model's;
    `tokenizer`: if it is not the base model's. Raises InvalidRequestError."""
    max_tokens = _max_tokens(request, len(tokens), info.max_model_len)
    vocab_size = info.vocab_size + added_tokens
    _check_token_ids(request, vocab_size)
    seed = secrets.randbits(63) if request.sampling.seed is None else request.sampling.seed
    sampler = SamplerState(
        request.sampling,
        request.stopping,
        request.response,
        seed=seed,
        prompt_token_ids=tokens,
        eos_token_ids=base.eos_token_ids,
        vocab_size=vocab_size,
        matcher=None if compiled is None else Matcher(compiled, request.stopping),
    )
    detokenizer = Detokenizer(
        tokenizer or base.tokenizer,
        request.stopping.stop,
        prompt_token_ids=tokens,
        min_tokens=request.stopping.min_tokens,
    )
    return Rules(max_tokens, seed, sampler, detokenizer)


def has_added(request: GenerationRequest, vocab_size: int) -> bool:
    """Whether it names tokens that the base model does not have."""
    named = (request.prompt.token_ids or (), request.stopping.stop_token_ids, request.sampling.logit_bias)
    return any(max(ids, default=0) >= vocab_size for ids in named)


def _max_tokens(request: GenerationRequest, num_prompt: int, limit: int) -> int:
    if num_prompt >= limit:
        raise InvalidRequestError("prompt", num_prompt, f"the prompt must be shorter than {limit} tokens")
    room, wanted = limit - num_prompt, request.stopping.max_tokens
    if wanted is not None and wanted > room:
        problem = f"the prompt's {num_prompt} tokens leave room for {room} of at most {limit}"
        raise InvalidRequestError("stopping.max_tokens", wanted, problem)
    return room if wanted is None else wanted


def _check_token_ids(request: GenerationRequest, vocab_size: int) -> None:
    fields = {
        "stopping.stop_token_ids": request.stopping.stop_token_ids,
        "sampling.logit_bias": request.sampling.logit_bias,
    }
    for field, ids in fields.items():
        for token in ids:
            if not 0 <= token < vocab_size:
                raise InvalidRequestError(field, token, f"token ids of this model are 0 to {vocab_size - 1}")
