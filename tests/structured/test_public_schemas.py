"""Five hundred schemas that others wrote: each compiles, or is refused with a reason, and none takes long."""

from __future__ import annotations

import pytest
from support.structured import tiny_vocabulary

from benchmarks.structured.ours import try_public
from benchmarks.structured.public import MissingError, public_schemas
from gralora_runtime.structured.compiler import Compiler

NUMBER = 500
LEAST = 150  # that compile; 202 do with the tiny model's tokens


async def test_every_public_schema_is_compiled_or_refused_with_a_reason() -> None:
    try:
        schemas = public_schemas(NUMBER)
    except MissingError as error:
        pytest.skip(f"{error}: make install")
    compiler = Compiler(tiny_vocabulary)
    try:
        tried = await try_public(compiler, schemas)
    finally:
        compiler.close()
    outcomes = [one.outcome for one in tried]

    assert len(tried) == NUMBER
    assert set(outcomes) <= {"compiled", "refused", "too long"}
    assert outcomes.count("compiled") >= LEAST
