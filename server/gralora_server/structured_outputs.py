"""What an answer has to match, as vLLM's clients say it over whatever protocol, into a message of ours. What can be
compiled is found out later, where gRPC's requests are.
"""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import Field

from gralora.v1 import generation_pb2
from gralora_runtime.errors import InvalidRequestError
from gralora_server.json_values import List, Whole

FORMATS = ("json_", "regex", "choice", "grammar", "json_object")


class StructuredOutputs(Whole):
    """vLLM's. Exactly one of the first five is set."""

    json_: dict[str, Any] | str | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: List[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    # What vLLM's own client writes of things that nobody asked for.
    structural_tag: None = None
    whitespace_pattern: None = None
    disable_any_whitespace: Literal[False] = False
    disable_fallback: Literal[False] = False
    disable_additional_properties: Literal[False] = False


def put_structured(given: StructuredOutputs, output: generation_pb2.StructuredOutput, *, place: str) -> None:
    """Write it into `output`, in which a format may be set already. `place`: its name, in errors.

    Raises InvalidRequestError unless that makes one format.
    """
    given.checked(place)
    wanted = [name for name in FORMATS if getattr(given, name) not in (None, False)]
    if len(wanted) + (output.WhichOneof("format") is not None) != 1:
        names = [name.rstrip("_") for name in wanted]
        raise InvalidRequestError(place, names, "must set one thing, and nothing else may say what an answer matches")
    try:
        _put(wanted[0], given, output, place)
    except UnicodeEncodeError:  # JSON can write half of a character
        field = f"{place}.{wanted[0].rstrip('_')}"
        raise InvalidRequestError(field, getattr(given, wanted[0]), "must be a text of whole characters") from None


def _put(name: str, given: StructuredOutputs, output: generation_pb2.StructuredOutput, place: str) -> None:
    match name:
        case "json_":
            output.json_schema = _schema(given.json_, place)
        case "choice":
            output.choice.CopyFrom(generation_pb2.Choices(texts=given.choice))  # there even if it is empty
        case _:
            setattr(output, name, getattr(given, name))


def _schema(given: dict[str, Any] | str | None, place: str) -> str:
    if isinstance(given, str):
        return given
    try:
        return json.dumps(given)
    except RecursionError:  # this goes a little less deep than what read it
        raise InvalidRequestError(f"{place}.json", "dict", "is nested too deeply") from None
