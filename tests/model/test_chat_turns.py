"""Conversations with tools, and such as go on with their last turn, through a model's chat template."""

from __future__ import annotations

import pytest
from support.tiny_models import tiny_tokenizer

from gralora_runtime.errors import InvalidRequestError
from gralora_runtime.model.chat_turns import knows_tools, tool_format
from gralora_runtime.model.tokenization import PromptTokenizer
from gralora_runtime.request import ChatMessage, Prompt, Tool, ToolCall

PLAIN = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
WITH_TOOLS = (
    "{% if tools %}call as <tool_call>: {% for t in tools %}{{ t.function.name }} {{ t.function.parameters | tojson }}"
    "{% endfor %}{% endif %}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}"
    "[{{ c.function.name }} {{ c.function.arguments.city }}]{% endfor %}</>{% endfor %}"
)
WEATHER = Tool("weather", "of a city", '{"type": "object"}')
CALLED = ChatMessage("assistant", "", (ToolCall("c1", "weather", '{"city": "Rome"}'),))
HELLO = ChatMessage("user", "hello")


def rendered(template: str, prompt: Prompt) -> str:
    fast = tiny_tokenizer()
    fast.chat_template = template
    prompts = PromptTokenizer(fast.backend_tokenizer, fast, len(fast))
    return fast.decode(prompts.encode(prompt), skip_special_tokens=False)


def test_a_template_that_knows_of_tools_gets_them_and_the_calls_before() -> None:
    text = rendered(WITH_TOOLS, Prompt(messages=(HELLO, CALLED), tools=(WEATHER,)))

    assert 'weather {"type": "object"}' in text
    assert "[weather Rome]" in text


@pytest.mark.parametrize("prompt", [Prompt(messages=(HELLO,), tools=(WEATHER,)), Prompt(messages=(HELLO, CALLED))])
def test_a_template_that_does_not_know_of_tools_drops_none(prompt: Prompt) -> None:
    with pytest.raises(InvalidRequestError, match="does not know of tools") as caught:
        rendered(PLAIN, prompt)

    assert caught.value.field == "messages.tools"


def test_a_last_turn_that_goes_on_has_no_end_and_no_other_is_asked_for() -> None:
    turns = (HELLO, ChatMessage("assistant", "Once upon"))

    assert rendered(PLAIN, Prompt(messages=turns)).endswith("</><assistant>")
    assert rendered(PLAIN, Prompt(messages=turns, continues=True)).endswith("<assistant>Once upon")


def test_a_template_says_how_its_model_calls_tools() -> None:
    llama = 'tools: {"name": function name, "parameters": dictionary of argument name and its value}'

    assert [tool_format(template) for template in (PLAIN, WITH_TOOLS, llama, "tools", None)] == [
        "",
        "hermes",
        "llama3_json",
        "",
        "",
    ]
    assert knows_tools({"default": PLAIN, "tool_use": WITH_TOOLS})
