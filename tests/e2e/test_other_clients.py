"""Other people's clients of OpenAI's API, in versions of their own: `make interop` installs them."""

from __future__ import annotations

import importlib.util

import pytest

from gralora_server import Client

QUESTION = "stop here"
TURNS = [{"role": "user", "content": QUESTION}]

pytestmark = pytest.mark.filterwarnings("default")  # what they warn of is theirs
needs_langchain = pytest.mark.skipif(
    importlib.util.find_spec("langchain_openai") is None, reason="langchain-openai is not installed: make interop"
)
needs_litellm = pytest.mark.skipif(
    importlib.util.find_spec("litellm") is None, reason="litellm is not installed: make interop"
)


@needs_langchain
def test_langchain(tiny_http: str, client: Client) -> None:
    from langchain_openai import ChatOpenAI

    expected = client.generate(messages=TURNS, adapter="a0", max_tokens=8, temperature=0)
    chat = ChatOpenAI(base_url=f"{tiny_http}/v1", api_key="none", model="a0", max_tokens=8, temperature=0)

    assert chat.invoke(QUESTION).content == expected.text
    assert "".join(piece.content for piece in chat.stream(QUESTION)) == expected.text


@needs_litellm
def test_litellm(tiny_http: str, client: Client) -> None:
    import litellm

    expected = client.generate(messages=TURNS, adapter="a1", max_tokens=8, temperature=0)
    question = {"model": "openai/a1", "api_base": f"{tiny_http}/v1", "api_key": "none", "messages": TURNS}
    question |= {"max_tokens": 8, "temperature": 0}
    answer = litellm.completion(**question)
    pieces = list(litellm.completion(**question, stream=True))

    assert answer.choices[0].message.content == expected.text
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == expected.text
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(**question | {"model": "openai/nobody"})
