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
from support.structured import accepts, compiled

from gralora.v1 import generation_pb2
from gralora_runtime.errors import InvalidRequestError
from gralora_runtime.request import ChatMessage, FinishReason, StructuredOutput, Tool, ToolCall
from gralora_server.http.forced_calls import grammar_of_calls
from gralora_server.http.tool_calls import FORMATS, FoundCall, HermesScanner, Llama3Scanner, ToolScanner

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
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": "maybe"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
        (
            {"tools": [WEATHER], "tool_choice": "required", "response_format": {"type": "json_object"}},
            "tool_choice",
        ),
        ({"tools": [WEATHER], "parallel_tool_calls": False}, "parallel_tool_calls"),
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


STRICT_PARAMETERS = PARAMETERS | {"required": ["city"], "additionalProperties": False}
STRICT = {"type": "function", "function": {"name": "weather", "parameters": STRICT_PARAMETERS}}
NAMED = {"type": "function", "function": {"name": "weather"}}
OTHER = {"type": "function", "function": {"name": "now", "parameters": {"additionalProperties": False}}}
ROME = '{"name": "weather", "arguments": {"city": "Rome"}}'
NOW = '{"name": "now", "arguments": {}}'


def hermes(*calls: str) -> str:
    return "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in calls)


@pytest.mark.parametrize(
    ("choice", "matching", "others"),
    [
        (
            {"tool_choice": "required"},
            [hermes(ROME), hermes(NOW), hermes(ROME, NOW, ROME)],
            ["hello", "", hermes(ROME) + " and", hermes(ROME.replace("Rome", '", "x": "')), ROME],
        ),
        ({"tool_choice": "required", "parallel_tool_calls": False}, [hermes(NOW)], [hermes(NOW, NOW)]),
        ({"tool_choice": NAMED}, [hermes(ROME)], [hermes(NOW), hermes(ROME, ROME)]),
    ],
    ids=["required", "one", "named"],
)
async def test_an_answer_may_have_to_be_calls(
    choice: dict[str, object], matching: list[str], others: list[str]
) -> None:
    """What the library makes of the grammar, character by character."""
    async with http_served(engine=ToolEngine()) as s:
        s.engine.script = [token(1, hermes(ROME)), finished(FinishReason.STOP)]
        response = await s.client.post("/v1/chat/completions", json=CHAT | {"tools": [STRICT, OTHER]} | choice)
    (request,) = s.engine.requests
    what = compiled(request.structured_output)

    assert response.json()["choices"][0]["finish_reason"] == "tool_calls"
    assert [accepts(what, text) for text in matching] == [True] * len(matching)
    assert [accepts(what, text) for text in others] == [False] * len(others)


def test_calls_are_written_as_the_family_writes_them() -> None:
    tool = generation_pb2.Tool(name="weather", parameters=json.dumps(STRICT_PARAMETERS))
    grammar = grammar_of_calls([tool], FORMATS["llama3_json"], only_one=False)
    what = compiled(StructuredOutput(grammar=grammar))
    call = '{"name": "weather", "parameters": {"city": "Rome"}}'

    assert accepts(what, call)
    assert accepts(what, f"{call}; {call}")
    assert not accepts(what, f"{call} {call}")


async def test_what_is_wrong_with_a_tool_s_parameters_is_named() -> None:
    """The engine of this test compiles nothing, and says what one that does would."""
    refused = InvalidRequestError("structured_output.grammar", "start: ...", "cannot be compiled: no such thing")
    async with http_served(engine=ToolEngine()) as s:
        s.engine.refusals.append(refused)
        body = CHAT | {"tools": [WEATHER], "tool_choice": "required"}
        response = await s.client.post("/v1/chat/completions", json=body)

    assert (response.status_code, error_of(response)["param"]) == (400, "tools")
    assert "no such thing" in error_of(response)["message"]


async def test_a_last_turn_may_be_gone_on_with() -> None:
    turns = [*CHAT["messages"], {"role": "assistant", "content": "Once upon"}]
    async with http_served() as s:
        s.engine.script = [finished()]
        body = CHAT | {"messages": turns, "continue_final_message": True, "add_generation_prompt": False}
        response = await s.client.post("/v1/chat/completions", json=body)

    assert response.status_code == 200
    assert s.engine.requests[0].prompt.continues
