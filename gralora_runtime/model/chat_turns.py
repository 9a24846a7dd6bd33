"""Turns and tools of a conversation, as chat templates expect them, and what a template knows. Renders nothing."""

from __future__ import annotations

import json
from typing import Any

from gralora_runtime.request import ChatMessage, Tool, ToolCall

# What a template has in it that asks for calls in this format; the first that is found counts.
FORMATS = (("<tool_call>", "hermes"), ('"parameters": dictionary of argument name', "llama3_json"))


def knows_tools(template: object) -> bool:
    """Whether tools would be told to the model, and not dropped. Some models have several templates, by name."""
    return "tools" in _text(template)


def tool_format(template: object) -> str:
    """How the model is asked to write its calls; "" if that is not known here."""
    if not knows_tools(template):
        return ""
    return next((name for mark, name in FORMATS if mark in _text(template)), "")


def as_template_has_it(message: ChatMessage) -> dict[str, Any]:
    """A field that is not set is not there, as templates ask whether it is."""
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        turn["tool_calls"] = [_call(call) for call in message.tool_calls]
    if message.tool_call_id:
        turn["tool_call_id"] = message.tool_call_id
    if message.name:
        turn["name"] = message.name
    return turn


def tool_as_template_has_it(tool: Tool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name, "description": tool.description}
    if tool.parameters:
        function["parameters"] = json.loads(tool.parameters)
    return {"type": "function", "function": function}


def _call(call: ToolCall) -> dict[str, Any]:
    """Templates write arguments as JSON themselves."""
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": call.name, "arguments": json.loads(call.arguments or "{}")},
    }


def _text(template: object) -> str:
    if isinstance(template, dict):
        return "".join(str(one) for one in template.values())
    return str(template or "")
