"""Calls of tools: found in a model's text wherever it is cut, and told as OpenAI's clients expect them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import fake_engine
from support.fake_engine import FakeEngine, finished, token
from support.http_harness import CHAT, error_of, events, http_served, text_of

from gralora_runtime.request import ChatMessage, FinishReason, Tool, ToolCall
from gralora_server.http.tool_calls import FoundCall, HermesScanner, Llama3Scanner, ToolScanner

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": PARAMETERS}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
FOUND = FoundCall("weather", '{"city": "Rome"}')


class ToolEngine(FakeEngine):
    """Its model's template knows of tools."""

    def info(self):
        return replace(fake_engine.INFO, tool_format="hermes")


def scanned(scanner: ToolScanner, pieces: list[str]) -> list[str | FoundCall]:
    """With neighbouring texts joined."""
    found: list[str | FoundCall] = []
    for one in [one for piece in pieces for one in scanner.push(piece)] + list(scanner.end()):
        if found and isinstance(one, str) and isinstance(found[-1], str):
            found[-1] += one
        else:
            found.append(one)
    return found


HERMES = [
    ("hello <b>you</b>", ["hello <b>you</b>"]),
    (CALL, [FOUND]),
    (f"I look.\n{CALL}", ["I look.\n", FOUND]),
    (CALL + CALL, [FOUND, FOUND]),
    (CALL.removesuffix("</tool_call>"), [FOUND]),
    (
        "<tool_call>[" + '{"name": "a", "arguments": {}}, {"name": "b"}' + "]</tool_call>",
        [FoundCall("a", "{}"), FoundCall("b", "{}")],
    ),
    ("<tool_call>no json</tool_call> x", ["<tool_call>no json</tool_call> x"]),
    ('<tool_call>{"name": 5}</tool_call>', ['<tool_call>{"name": 5}</tool_call>']),
    ("<tool_call>{", ["<tool_call>{"]),
    ("a <tool_", ["a <tool_"]),
    ("", []),
]
LLAMA = [
    ("hello", ["hello"]),
    ('{"name": "weather", "parameters": {"city": "Rome"}}', [FOUND]),
    (' {"name": "a", "parameters": {}}; {"name": "b", "parameters": {}}', [FoundCall("a", "{}"), FoundCall("b", "{}")]),
    ('{"answer": 5}', ['{"answer": 5}']),
    ('{"name": "a"} and more', ['{"name": "a"} and more']),
    ("{" * 5000, ["{" * 5000]),
]


@pytest.mark.parametrize(
    ("make", "text", "expected"),
    [(HermesScanner, *case) for case in HERMES] + [(Llama3Scanner, *case) for case in LLAMA],
)
@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)  # on a busy machine
@given(st.data())
def test_calls_are_found_wherever_a_text_is_cut(make, text: str, expected: list[str | FoundCall], data) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]

    assert scanned(make(), pieces) == expected


def test_text_that_can_be_no_call_is_not_kept_back() -> None:
    assert list(HermesScanner().push("a < b")) == ["a < b"]
    assert list(HermesScanner().push("a <tool")) == ["a "]
    assert list(Llama3Scanner().push("a {")) == ["a {"]


async def test_a_call_of_a_tool_is_told_as_one() -> None:
    async with http_served(engine=ToolEngine()) as s:
        s.engine.script = [token(1, "I look."), token(2, CALL), finished(FinishReason.STOP, output_tokens=2)]
        response = await s.client.post("/v1/chat/completions", json=CHAT | {"tools": [WEATHER]})

    (choice,) = response.json()["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "I look."
    (call,) = choice["message"]["tool_calls"]
    assert (call["type"], call["function"]) == ("function", {"name": "weather", "arguments": '{"city": "Rome"}'})
    (tool,) = s.engine.requests[0].prompt.tools
    assert tool == Tool("weather", "of a city", json.dumps(PARAMETERS))


async def test_a_call_of_a_tool_in_events() -> None:
    async with http_served(engine=ToolEngine()) as s:
        s.engine.script = [*(token(1, character) for character in "so: " + CALL), finished(FinishReason.STOP)]
        body = CHAT | {"tools": [WEATHER], "stream": True}
        async with s.client.stream("POST", "/v1/chat/completions", json=body) as response:
            pieces = (await events(response))[:-1]

    assert text_of(pieces) == "so: "
    calls = [call for piece in pieces for call in piece["choices"][0]["delta"].get("tool_calls", ())]
    assert [(call["index"], call["function"]["name"]) for call in calls] == [(0, "weather")]
    assert pieces[-1]["choices"][0]["finish_reason"] == "tool_calls"


async def test_what_a_model_called_before_goes_to_its_template() -> None:
    function = {"name": "weather", "arguments": '{"city": "Rome"}'}
    turns = [
        *CHAT["messages"],
        {"role": "assistant", "content": None, "tool_calls": [{"id": "c1", "type": "function", "function": function}]},
        {"role": "tool", "tool_call_id": "c1", "content": "sunny", "name": "weather"},
    ]
    async with http_served(engine=ToolEngine()) as s:
        s.engine.script = [finished()]
        response = await s.client.post("/v1/chat/completions", json=CHAT | {"messages": turns, "tools": [WEATHER]})

    assert response.status_code == 200
    _, called, answered = s.engine.requests[0].prompt.messages
    assert called == ChatMessage("assistant", "", (ToolCall("c1", "weather", '{"city": "Rome"}'),))
    assert answered == ChatMessage("tool", "sunny", tool_call_id="c1", name="weather")


async def test_tools_that_are_not_to_be_called_are_not_told() -> None:
    async with http_served() as s:
        s.engine.script = [finished()]
        body = CHAT | {"tools": [WEATHER], "tool_choice": "none"}
        response = await s.client.post("/v1/chat/completions", json=body)

    assert response.status_code == 200
    assert s.engine.requests[0].prompt.tools == ()


async def test_tools_of_a_model_that_calls_them_in_no_known_way_are_refused() -> None:
    async with http_served() as s:
        response = await s.client.post("/v1/chat/completions", json=CHAT | {"tools": [WEATHER]})

    assert (response.status_code, error_of(response)["param"]) == (400, "tools")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"tools": [{"type": "function", "function": {"name": ""}}]}, "tools[0].name"),
        ({"tools": [{"type": "other"}]}, "tools[0]"),
        ({"tools": [WEATHER], "tool_choice": "required"}, "tool_choice"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "a", "arguments": "[]"}}]}]},
            "messages[0].tool_calls[0].arguments",
        ),
        ({"continue_final_message": True, "add_generation_prompt": True}, "add_generation_prompt"),
    ],
)
async def test_what_is_wrong_with_tools_is_named(change: dict[str, object], field: str) -> None:
    async with http_served(engine=ToolEngine()) as s:
        response = await s.client.post("/v1/chat/completions", json=CHAT | change)

    assert (response.status_code, error_of(response)["code"]) == (400, "INVALID_REQUEST")
    assert error_of(response)["param"].startswith(field)


async def test_a_last_turn_may_be_gone_on_with() -> None:
    turns = [*CHAT["messages"], {"role": "assistant", "content": "Once upon"}]
    async with http_served() as s:
        s.engine.script = [finished()]
        body = CHAT | {"messages": turns, "continue_final_message": True, "add_generation_prompt": False}
        response = await s.client.post("/v1/chat/completions", json=body)

    assert response.status_code == 200
    assert s.engine.requests[0].prompt.continues
