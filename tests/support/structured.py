"""Grammars over the tiny models' tokens, answers of pure noise that have to match them, and whether JSON does."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from functools import cache
from typing import Any

import numpy as np
import torch
from support.tiny_models import VOCAB_SIZE, tiny_tokenizer
from tokenizers import Tokenizer

from gralora_runtime.request import ResponseParams, SamplingParams, StoppingParams, StructuredOutput
from gralora_runtime.sampling.host import advance, sample
from gralora_runtime.sampling.outcome import Sampled, SampledToken
from gralora_runtime.sampling.state import SamplerState
from gralora_runtime.structured.compiler import _compile
from gralora_runtime.structured.grammar import Wanted
from gralora_runtime.structured.masks import fill
from gralora_runtime.structured.matcher import Compiled, Matcher
from gralora_runtime.structured.vocabulary import Vocabulary, as_bools

EOS = 1
COMPACT = {"x-guidance": {"whitespace_flexible": False}}
KINDS = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool, "null": type(None)}


@cache
def tiny_text() -> Tokenizer:
    return Tokenizer.from_str(tiny_tokenizer().backend_tokenizer.to_str())


@cache
def tiny_vocabulary() -> Vocabulary:
    return Vocabulary(tiny_text(), eos_token_ids=frozenset({EOS}), vocab_size=VOCAB_SIZE, num_threads=2)


def made(vocabulary: Vocabulary) -> Future[Vocabulary]:
    future: Future[Vocabulary] = Future()
    future.set_result(vocabulary)
    return future


def compiled(output: StructuredOutput, vocabulary: Vocabulary | None = None) -> Compiled:
    found = _compile(Wanted.of(output), made(vocabulary or tiny_vocabulary()))
    assert isinstance(found, Compiled), found
    return found


def state_of(
    what: Compiled,
    *,
    sampling: SamplingParams = SamplingParams(),  # noqa: B008  # frozen
    stopping: StoppingParams = StoppingParams(),  # noqa: B008
    seed: int = 0,
) -> SamplerState:
    return SamplerState(
        sampling, stopping, ResponseParams(), seed=seed, prompt_token_ids=(), eos_token_ids=(EOS,),
        vocab_size=VOCAB_SIZE, matcher=Matcher(what, stopping),
    )  # fmt: skip


def step(state: SamplerState, logits: torch.Tensor) -> Sampled:
    """One token, as an executor has it chosen."""
    assert state.matcher is not None
    fill([state.matcher])
    [sampled] = advance([state], sample(logits, [state]))
    return sampled


def answer(state: SamplerState, *, seed: int = 0, most: int = 3000) -> list[int]:
    """Tokens by logits that mean nothing, until the answer is complete or has so many."""
    random = np.random.default_rng(seed)
    tokens: list[int] = []
    while len(tokens) < most:
        sampled = step(state, torch.from_numpy(random.normal(size=(1, VOCAB_SIZE)).astype(np.float32)))
        assert isinstance(sampled, SampledToken), sampled
        tokens.append(sampled.token_id)
        if sampled.completes:
            return tokens
    return tokens


def accepts(what: Compiled, text: str) -> bool:
    """Whether an answer may be this and then end."""
    matcher = Matcher(what, StoppingParams())
    token_ids = tiny_text().encode(text, add_special_tokens=False).ids
    assert tiny_text().decode(token_ids) == text
    for token_id in token_ids:
        if matcher.is_complete:
            return False
        matcher.advance(token_id)
    fill([matcher])
    assert matcher.mask is not None
    return bool(as_bools(matcher.mask, VOCAB_SIZE)[EOS])


def text_of(tokens: list[int]) -> str:
    return str(tiny_text().decode(tokens))


def matches(value: object, schema: Mapping[str, Any]) -> bool:
    """Of JSON Schema as much as the tests' schemas use."""
    if "anyOf" in schema:
        return any(matches(value, one) for one in schema["anyOf"])
    if "enum" in schema:
        return isinstance(value, str) and value in schema["enum"]
    return type(value) is KINDS[schema["type"]] and _fits(value, schema)


def _fits(value: object, schema: Mapping[str, Any]) -> bool:
    """A value of the right kind."""
    match value:
        case bool() | None:
            return True
        case int():
            return bool(schema["minimum"] <= value <= schema["maximum"])
        case str():
            return bool(schema["minLength"] <= len(value) <= schema["maxLength"])
        case list():
            fits = schema["minItems"] <= len(value) <= schema["maxItems"]
            return fits and all(matches(item, schema["items"]) for item in value)
        case dict():
            known = schema["properties"]
            fits = set(schema["required"]) <= value.keys() <= known.keys()
            return fits and all(matches(item, known[name]) for name, item in value.items())
    raise AssertionError(value)


def an_object(required: list[str] | None = None, **properties: Mapping[str, Any]) -> dict[str, Any]:
    """All are required unless it is said which."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties) if required is None else required,
        "additionalProperties": False,
    }


def integer(low: int, high: int) -> dict[str, Any]:
    return {"type": "integer", "minimum": low, "maximum": high}


def string(most: int, least: int = 0) -> dict[str, Any]:
    return {"type": "string", "minLength": least, "maxLength": most}


def array(items: Mapping[str, Any], most: int, least: int = 0) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


BOOLEAN = {"type": "boolean"}
NULL = {"type": "null"}
COLOURS = {"enum": ["red", "green", "blue"]}
# All are bounded, so that noise comes to their ends.
SCHEMAS: tuple[dict[str, Any], ...] = (
    an_object(ok=BOOLEAN),
    an_object(colour=COLOURS, count=integer(0, 99)),
    an_object(name=string(6)),
    an_object(left=an_object(x=integer(-5, 5)), right=an_object(y=BOOLEAN)),
    array(integer(0, 9), 4, 2),
    an_object(tags=array(COLOURS, 3)),
    an_object(["a"], a=BOOLEAN, b=NULL, c=integer(1, 3)),
    an_object(value={"anyOf": [BOOLEAN, integer(10, 20), COLOURS]}),
    array(an_object(on=BOOLEAN), 3),
    an_object(code=string(3, 3), at=integer(1000, 1100)),
    string(8, 2),
    integer(-100, 100),
    an_object(nothing=NULL),
    array(array(BOOLEAN, 2), 2, 1),
    an_object([], maybe=COLOURS, perhaps=string(4)),
    an_object(deep=an_object(deeper=an_object(deepest=array(BOOLEAN, 2)))),
)
