"""What an answer has to match that is nothing but calls of tools, written as the model's family writes them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from gralora.v1 import generation_pb2
from gralora_runtime.structured.grammar import SCHEMA_DEFAULTS
from gralora_server.http.tool_calls import ToolFormat


def grammar_of_calls(tools: Sequence[generation_pb2.Tool], form: ToolFormat, *, only_one: bool) -> str:
    """Lark, in which the parameters of each tool are a schema by themselves: what one refers to stays its own.

    `tools`: at least one, whose parameters are JSON objects.
    """
    again = "" if only_one else f" ({_literal(form.between)} call)*"
    lines = [f"start: call{again}", f"call: {_literal(form.opens)}any{_literal(form.closes)}"]
    lines.append("any: " + " | ".join(f"tool_{number}" for number in range(len(tools))))
    for number, tool in enumerate(tools):
        lines += _rules(number, tool, form)
    return "\n".join(lines)


def _rules(number: int, tool: generation_pb2.Tool, form: ToolFormat) -> Iterator[str]:
    given = json.loads(tool.parameters) if tool.parameters else {}
    schema = {**SCHEMA_DEFAULTS, "type": "object", **given}
    before = f'{{"name": {json.dumps(tool.name)}, "{form.arguments}": '
    yield f'tool_{number}: {_literal(before)} arguments_{number} "}}"'
    yield f"arguments_{number}: %json {json.dumps(schema)}"


def _literal(text: str) -> str:
    """As Lark has it; nothing where there is nothing."""
    return json.dumps(text) + " " if text else ""
