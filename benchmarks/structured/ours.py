"""Compiling and masks by themselves, beside no model, as the engine does them."""

from __future__ import annotations

import time
from collections.abc import Mapping

from benchmarks.structured.figures import Tried
from benchmarks.structured.rates import Answers
from benchmarks.structured.schemas import schema
from gralora.v1 import generation_pb2
from gralora_runtime.errors import InvalidRequestError
from gralora_runtime.request import StoppingParams, StructuredOutput
from gralora_runtime.structured.compiler import COMPILE_S, Compiler
from gralora_runtime.structured.masks import fill
from gralora_runtime.structured.matcher import Matcher
from gralora_server.validation import validate_structured_output


async def compile_times(compiler: Compiler, texts: list[str]) -> list[float]:
    """Seconds of each."""
    found = []
    for text in texts:
        began_s = time.perf_counter()
        await compiler.compile(StructuredOutput(json_schema=text))
        found.append(time.perf_counter() - began_s)
    return found


async def mask_times(compiler: Compiler, answers: Answers) -> list[float]:
    """Seconds of each step, in which the masks of all these answers are filled."""
    stopping = StoppingParams(ignore_eos=True)
    outputs = [StructuredOutput(json_schema=schema(number)) for number in range(len(answers))]
    matchers = [Matcher(await compiler.compile(output), stopping) for output in outputs]
    found = []
    for tokens in zip(*answers, strict=True):
        began_s = time.perf_counter()
        fill(matchers)
        found.append(time.perf_counter() - began_s)
        for matcher, token in zip(matchers, tokens, strict=True):
            matcher.advance(token)
    return found


async def try_public(compiler: Compiler, schemas: Mapping[str, str]) -> list[Tried]:
    """Each as a request would bring it: checked, then compiled. Raises what is no error of the request's."""
    return [await _try_one(compiler, name, text) for name, text in schemas.items()]


async def _try_one(compiler: Compiler, name: str, text: str) -> Tried:
    began_s = time.perf_counter()
    try:
        validate_structured_output(generation_pb2.StructuredOutput(json_schema=text))
    except InvalidRequestError:
        return Tried(name, "too long", time.perf_counter() - began_s)
    try:
        await compiler.compile(StructuredOutput(json_schema=text))
    except InvalidRequestError as error:
        seconds = time.perf_counter() - began_s
        said = "refused" if error.problem else "refused without a reason"
        return Tried(name, "too slow" if seconds >= COMPILE_S else said, seconds)
    return Tried(name, "compiled", time.perf_counter() - began_s)
