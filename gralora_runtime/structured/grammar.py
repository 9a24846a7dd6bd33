"""What a request asks of its answer, as one grammar that the library reads. Knows no tokens, and compiles nothing."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llguidance import LLMatcher

from gralora_runtime.errors import InvalidRequestError
from gralora_runtime.request import StructuredOutput

# Unbounded, a model that likes white space writes it until its tokens run out. A schema may say otherwise.
SCHEMA_DEFAULTS: Mapping[str, Any] = {"x-guidance": {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,16}"}}


@dataclass(frozen=True, slots=True)
class Wanted:
    """What was asked for, and the field that asked for it."""

    field: str
    source: str

    @classmethod
    def of(cls, output: StructuredOutput) -> Wanted:
        if output.json_schema is not None:
            return cls("structured_output.json_schema", output.json_schema)
        if output.regex is not None:
            return cls("structured_output.regex", output.regex)
        if output.grammar is not None:
            return cls("structured_output.grammar", output.grammar)
        if output.choice is not None:
            return cls("structured_output.choice", "|".join(map(re.escape, output.choice)))
        assert output.json_object, "a structured output that asks for nothing"
        return cls("structured_output.json_object", '{"type": "object"}')

    @property
    def digest(self) -> bytes:
        return hashlib.sha256(f"{self.field}\0{self.source}".encode()).digest()

    def grammar(self) -> str:
        """Raises ValueError for a schema that is none at first sight. All else is for the compiler to find."""
        match self.field.rpartition(".")[2]:
            case "regex" | "choice":
                return str(LLMatcher.grammar_from_regex(self.source))
            case "grammar":
                return _alone(lark_grammar=self.source)
            case _:
                return _alone(json_schema={**SCHEMA_DEFAULTS, **self._schema()})

    def refused(self, problem: str) -> InvalidRequestError:
        return InvalidRequestError(self.field, self.source, problem)

    def _schema(self) -> dict[str, Any]:
        try:
            schema = json.loads(self.source)
        except RecursionError as error:
            raise ValueError("is nested too deeply") from error
        if not isinstance(schema, dict):
            raise ValueError(f"a schema is a JSON object, and this is a {type(schema).__name__}")  # noqa: TRY004
        return schema


def _alone(**grammar: object) -> str:
    """Written by us from the outside in, so that no source sets what stands beside it."""
    return json.dumps({"grammars": [grammar]})
