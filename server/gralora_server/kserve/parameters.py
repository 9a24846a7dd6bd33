"""Sampling parameters by vLLM's names, into a message of ours. Ranges are checked where gRPC's requests are.

Numbers may be texts, as Triton's samples write them. What is not known is refused, since whoever sent it expects
something of it; so are known ones with a value that we could only ignore.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping

from pydantic import ValidationError

from gralora.v1 import generation_pb2
from gralora_runtime.errors import InvalidRequestError
from gralora_server.explanation import clip
from gralora_server.json_values import misfit, shown
from gralora_server.sampling_names import FIXED, REALS, check_fixed
from gralora_server.structured_outputs import StructuredOutputs, put_structured

MAX_TOKENS = 16  # vLLM's, if a request does not say how many
MAX_JSON_CHARS = 1 << 20
MAX_NAME_BYTES = 80  # of one that is not known, in an error
INT32 = (-(2**31), 2**31 - 1)
SEEDS = (-1, 2**64 - 1)  # -1: none

TOKEN_COUNTS = ("max_tokens", "min_tokens")
TEXTS = ("request_id", "canary_key")
STRUCTURED = ("structured_outputs", "guided_decoding")  # vLLM's name for it, and its older one
_INTEGER = re.compile(r"-?[0-9]{1,20}")
_FLAGS = {"true": True, "false": False}


def put(given: Mapping[str, object], request: generation_pb2.StreamGenerateRequest) -> None:
    """Write what is given into the request. None is as if it were not given, but for `max_tokens`: as many as there is
    room for. Raises InvalidRequestError naming the parameter.
    """
    if "max_tokens" not in given:
        request.stopping.max_tokens = MAX_TOKENS
    for name, value in given.items():
        if value is not None:
            _put_one(name, value, request)


def json_object(name: str, written: str) -> dict[str, object]:
    if len(written) > MAX_JSON_CHARS:
        raise InvalidRequestError(name, f"{len(written)} characters", f"must have at most {MAX_JSON_CHARS} characters")
    try:
        found = json.loads(written)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise InvalidRequestError(name, shown(written), "must be a JSON object")
    return found


def text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise InvalidRequestError(name, shown(value), "must be a text")
    try:
        value.encode()
    except UnicodeEncodeError as cause:  # JSON can write half of a character
        raise InvalidRequestError(name, shown(value), "must be a text of whole characters") from cause
    return value


def flag(name: str, value: object) -> bool:
    said = _FLAGS.get(value.lower()) if isinstance(value, str) else value
    if not isinstance(said, bool):
        raise InvalidRequestError(name, shown(value), "must be true or false")
    return said


def real(name: str, value: object) -> float:
    if not isinstance(value, bool) and isinstance(value, int | float | str):
        try:
            return float(value)
        except (ValueError, OverflowError):
            pass
    raise InvalidRequestError(name, shown(value), "must be a number")


def integer(name: str, value: object, bounds: tuple[int, int]) -> int:
    """A real number will do that has no fraction."""
    match value:
        case str() if _INTEGER.fullmatch(value):
            said = int(value)
        case float() if value.is_integer():
            said = int(value)
        case int() if not isinstance(value, bool):
            said = value
        case _:
            raise InvalidRequestError(name, shown(value), "must be an integer")
    low, high = bounds
    if not low <= said <= high:
        raise InvalidRequestError(name, shown(value), f"must be {low} to {high}")
    return said


def _put_one(name: str, value: object, request: generation_pb2.StreamGenerateRequest) -> None:
    if name in REALS:
        setattr(request.sampling, name, real(name, value))
    elif name in TOKEN_COUNTS:
        setattr(request.stopping, name, integer(name, value, INT32))
    elif name in TEXTS:
        setattr(request, name, text(name, value))
    elif name in STRUCTURED:
        put_structured(_structured(name, value), request.structured_output, place=name)
    elif name in FIXED:
        only = FIXED[name]
        check_fixed(name, flag(name, value) if isinstance(only, bool) else real(name, value))
    else:
        _put_special(name, value, request)


def _put_special(name: str, value: object, request: generation_pb2.StreamGenerateRequest) -> None:
    match name:
        case "top_k":
            top_k = integer(name, value, INT32)
            if top_k != -1:
                request.sampling.top_k = top_k
        case "seed":
            seed = integer(name, value, SEEDS)
            if seed != -1:
                request.sampling.seed = seed
        case "logit_bias":
            for token_id, bias in _biases(name, value):
                request.sampling.logit_bias[token_id] = bias
        case "stop":
            stops = value if isinstance(value, list) else [value]
            request.stopping.stop.extend(text(name, stop) for stop in stops)
        case "stop_token_ids":
            if not isinstance(value, list):
                raise InvalidRequestError(name, shown(value), "must be a list of token ids")
            request.stopping.stop_token_ids.extend(integer(name, token_id, INT32) for token_id in value)
        case "ignore_eos":
            request.stopping.ignore_eos = flag(name, value)
        case _:
            problem = "is a parameter that this server does not know"
            raise InvalidRequestError(clip(name, MAX_NAME_BYTES), type(value).__name__, problem)


def _structured(name: str, value: object) -> StructuredOutputs:
    given = json_object(name, value) if isinstance(value, str) else value
    try:
        return StructuredOutputs.model_validate(given)
    except ValidationError as error:
        raise misfit(error, name) from None


def _biases(name: str, value: object) -> Iterator[tuple[int, float]]:
    if not isinstance(value, dict):
        raise InvalidRequestError(name, shown(value), "must be numbers by token id")
    for token_id, bias in value.items():
        yield integer(name, token_id, INT32), real(name, bias)
