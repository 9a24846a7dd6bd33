"""OpenAI's own client against the HTTP port: what it reads, and what it makes of errors."""

from __future__ import annotations

import asyncio

import openai
import pytest
from support.fake_engine import finished, token
from support.http_harness import HttpServed, http_served

from gralora_runtime.errors import AdapterNotFoundError, QueueFullError
from gralora_runtime.request import FinishReason

TURNS = [{"role": "user", "content": "hello"}]


def client_of(s: HttpServed, **options: object) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{s.url}/v1", api_key="none", **options)


async def test_a_chat() -> None:
    async with http_served() as s, client_of(s) as client:
        s.engine.script = [token(1), token(2), finished(FinishReason.STOP, output_tokens=2)]
        answer = await client.chat.completions.create(model="poet", messages=TURNS)

    assert answer.choices[0].message.content == "t1 t2 "
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == 5


async def test_a_stream() -> None:
    async with http_served() as s, client_of(s) as client:
        s.engine.script = [token(1), token(2), finished(output_tokens=2)]
        options = {"include_usage": True}
        stream = await client.chat.completions.create(model="poet", messages=TURNS, stream=True, stream_options=options)
        pieces = [piece async for piece in stream]

    assert "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices) == "t1 t2 "
    assert pieces[-1].usage.completion_tokens == 2


async def test_a_completion_and_the_models() -> None:
    async with http_served() as s, client_of(s) as client:
        s.engine.script = [token(1), finished(output_tokens=1)]
        answer = await client.completions.create(model="fake", prompt="hello")
        models = [model.id async for model in client.models.list()]

    assert answer.choices[0].text == "t1 "
    assert models == ["fake", "poet"]


async def test_a_client_without_asyncio() -> None:
    async with http_served() as s:
        s.engine.script = [token(1), finished(output_tokens=1)]

        def ask() -> str:
            with openai.OpenAI(base_url=f"{s.url}/v1", api_key="none") as client:
                return client.completions.create(model="fake", prompt="hello").choices[0].text

        assert await asyncio.to_thread(ask) == "t1 "


async def test_an_unknown_adapter_is_an_error_of_its_own() -> None:
    async with http_served() as s, client_of(s) as client:
        s.engine.refusals = [AdapterNotFoundError("nobody")]
        with pytest.raises(openai.NotFoundError) as caught:
            await client.chat.completions.create(model="nobody", messages=TURNS)

    assert caught.value.code == "ADAPTER_NOT_FOUND"
    assert "nobody" in caught.value.message


async def test_a_refusal_for_now_is_tried_again_when_the_server_says_and_not_before() -> None:
    refusal = QueueFullError("7 requests wait", 0.05)
    async with http_served() as s, client_of(s, max_retries=1) as client:
        s.engine.refusals = [refusal]
        s.engine.script = [token(1), finished(output_tokens=1)]
        answer = await client.completions.create(model="fake", prompt="hello", extra_headers={"X-Request-Id": "r1"})

    assert answer.choices[0].text == "t1 "
    assert [request.request_id for request in s.engine.requests] == ["r1", "r1"]


async def test_a_bad_parameter_is_named() -> None:
    async with http_served() as s, client_of(s) as client:
        with pytest.raises(openai.BadRequestError) as caught:
            await client.chat.completions.create(model="fake", messages=TURNS, temperature=-1)

    assert (caught.value.param, caught.value.code) == ("temperature", "INVALID_REQUEST")
