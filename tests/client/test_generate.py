"""Both clients against the real gRPC server, with an engine that the test plays."""

from __future__ import annotations

import asyncio
import gc

import pytest
from support.both_clients import Connect, call, close, connect_async, connect_sync, deltas, next_delta
from support.fake_engine import finished, token
from support.grpc_harness import served

from gralora_runtime.errors import DrainingError
from gralora_runtime.request import (
    ChatMessage,
    Delta,
    GenerationRequest,
    Prompt,
    ResponseParams,
    SamplingParams,
    StoppingParams,
    StructuredOutput,
)
from gralora_server.client import (
    CallCancelledError,
    DeadlineError,
    FinishReason,
    ServerError,
    Timeouts,
    TokenLogprob,
    UnavailableError,
    Usage,
)
from gralora_server.client.responses import Assembler

both = pytest.mark.parametrize("connect", [connect_sync, connect_async], ids=["sync", "async"])

EVERY_OPTION = {
    "adapter": "poet",
    "request_id": "mine",
    "temperature": 0.5,
    "top_p": 0.75,
    "top_k": 3,
    "min_p": 0.25,
    "repetition_penalty": 1.5,
    "presence_penalty": 0.125,
    "frequency_penalty": -0.125,
    "seed": 2**64 - 1,
    "logit_bias": {7: -100.0},
    "max_tokens": 9,
    "min_tokens": 2,
    "stop": ["a", "b"],
    "stop_token_ids": [4, 5],
    "ignore_eos": True,
    "logprobs": True,
    "top_logprobs": 2,
    "echo_prompt_token_ids": True,
    "min_tokens_per_message": 4,
    "json_schema": {"type": "object"},
    "timeout_s": None,
}
AS_THE_ENGINE_SEES_IT = GenerationRequest(
    request_id="mine",
    prompt=Prompt(token_ids=(1, 2, 3)),
    adapter="poet",
    sampling=SamplingParams(
        temperature=0.5,
        top_p=0.75,
        top_k=3,
        min_p=0.25,
        repetition_penalty=1.5,
        presence_penalty=0.125,
        frequency_penalty=-0.125,
        seed=2**64 - 1,
        logit_bias={7: -100.0},
    ),
    stopping=StoppingParams(max_tokens=9, min_tokens=2, stop=("a", "b"), stop_token_ids=(4, 5), ignore_eos=True),
    response=ResponseParams(logprobs=True, top_logprobs=2, echo_prompt_token_ids=True),
    structured_output=StructuredOutput(json_schema='{"type": "object"}'),
)


@both
async def test_generate_returns_the_whole_and_what_served_it(connect: Connect) -> None:
    logprob = TokenLogprob(11, -0.5, ((11, -0.5), (12, -1.0)))
    async with served() as s, connect(s.port) as client:
        s.engine.script = [
            Delta(text="t11 ", token_ids=(11,), logprobs=(logprob,)),
            token(12),
            finished(FinishReason.STOP, output_tokens=2, stop_string="END"),
        ]
        generation = await call(
            client, "generate", "hi", adapter="poet", request_id="r7", seed=5, echo_prompt_token_ids=True
        )

    assert generation.request_id == "r7"
    assert generation.text == "t11 t12 "
    assert generation.token_ids == (11, 12)
    assert generation.logprobs == (logprob,)
    assert generation.finish_reason is FinishReason.STOP
    assert generation.stop_string == "END"
    assert generation.stop_token_id is None
    assert generation.usage == Usage(prompt_tokens=3, cached_tokens=1, output_tokens=2)
    assert (generation.adapter, generation.adapter_digest, generation.seed) == ("poet", "a" * 64, 5)
    assert generation.prompt_token_ids == (7, 8, 9)
    assert generation.queue_time_s == 0.25
    assert generation.ttft_s is None
    assert generation.total_s > 0


@both
@pytest.mark.parametrize("method", ["generate", "stream"])
async def test_every_option_reaches_the_engine(connect: Connect, method: str) -> None:
    async with served() as s, connect(s.port) as client:
        s.engine.script = [finished()]
        if method == "generate":
            await call(client, "generate", token_ids=[1, 2, 3], **EVERY_OPTION)
        else:
            await call(client.stream(token_ids=[1, 2, 3], **EVERY_OPTION), "read")

    assert s.engine.requests == [AS_THE_ENGINE_SEES_IT]


@both
async def test_messages_reach_the_engine(connect: Connect) -> None:
    async with served() as s, connect(s.port) as client:
        s.engine.script = [finished()]
        await call(client, "generate", messages=[{"role": "user", "content": "hi"}])

    assert s.engine.requests[0].prompt == Prompt(messages=(ChatMessage("user", "hi"),))


@both
async def test_a_streams_deltas_are_the_generation(connect: Connect) -> None:
    async with served() as s, connect(s.port) as client:
        stream = client.stream("hi", request_id="r1")
        first = await next_delta(stream)
        s.engine.streams["r1"].put(token(1))
        second = await next_delta(stream)
        s.engine.streams["r1"].put(token(2))
        s.engine.streams["r1"].put(finished(output_tokens=2, stop_token_id=2))
        rest = [delta async for delta in deltas(stream)]

    assert first.started is not None
    assert second.text == "t1 "
    assert "".join(delta.text for delta in rest) == "t2 "
    assert stream.request_id == "r1"
    assert stream.generation.text == "t1 t2 "
    assert stream.generation.token_ids == (1, 2)
    assert stream.generation.stop_token_id == 2
    assert 0 < stream.generation.ttft_s <= stream.generation.total_s


@both
async def test_a_stream_that_was_not_read_to_its_end_has_no_generation(connect: Connect) -> None:
    async with served() as s, connect(s.port) as client:
        stream = client.stream("hi")
        await next_delta(stream)
        with pytest.raises(RuntimeError, match="not read to its end"):
            _ = stream.generation
        await close(stream)


@both
async def test_closing_a_stream_aborts_the_request_and_ends_the_iteration(connect: Connect) -> None:
    async with served() as s, connect(s.port) as client:
        stream = client.stream("hi", request_id="r1")
        await next_delta(stream)
        await close(stream)
        await s.engine.abort_happened.wait()

        assert await next_delta(stream) is None
        assert s.engine.aborted == ["r1"]


@both
async def test_dropping_a_stream_aborts_the_request(connect: Connect) -> None:
    """`for delta in client.stream(...): break`, with nothing left that refers to the stream."""
    async with served() as s, connect(s.port) as client:
        stream = client.stream("hi", request_id="r1")
        await next_delta(stream)
        del stream
        gc.collect()
        await s.engine.abort_happened.wait()

    assert s.engine.aborted == ["r1"]


async def test_leaving_the_context_early_aborts_the_request() -> None:
    async with served() as s, connect_async(s.port) as client:
        async with client.stream("hi", request_id="r1") as stream:
            async for _ in stream:
                break
        await s.engine.abort_happened.wait()

    assert s.engine.aborted == ["r1"]


async def test_leaving_the_synchronous_context_early_aborts_the_request() -> None:
    async with served() as s, connect_sync(s.port) as client:

        def read_one() -> None:
            with client.stream("hi", request_id="r1") as stream:
                for _ in stream:
                    break

        await asyncio.to_thread(read_one)
        await s.engine.abort_happened.wait()

    assert s.engine.aborted == ["r1"]


@pytest.mark.parametrize("method", ["generate", "read"])
async def test_cancelling_the_task_aborts_the_request(method: str) -> None:
    async with served() as s, connect_async(s.port) as client:
        waiting = client.generate("hi", request_id="r1") if method == "generate" else client.stream("hi").read()
        task = asyncio.create_task(waiting)
        await s.engine.submitted.get()
        task.cancel()
        await s.engine.abort_happened.wait()

        with pytest.raises(asyncio.CancelledError):
            await task


@both
async def test_the_default_timeout_and_the_calls_own_reach_the_engine(connect: Connect) -> None:
    async with served() as s, connect(s.port, timeouts=Timeouts(generate_s=50.0)) as client:
        s.engine.script = [finished()]
        await call(client, "generate", "hi")
        await call(client, "generate", "hi", timeout_s=500.0)
        await call(client, "generate", "hi", timeout_s=None)
    # gRPC rounds a deadline up to what fits into eight digits of its unit
    default, own, none = (request.timeout_s for request in s.engine.requests)

    assert 40 < default <= 51
    assert 400 < own <= 502
    assert none is None


@both
async def test_a_timeout_is_a_deadline_error(connect: Connect) -> None:
    async with served() as s, connect(s.port) as client:
        s.engine.start_at_once = False
        with pytest.raises(DeadlineError):
            await call(client, "generate", "hi", timeout_s=0.2)


@both
@pytest.mark.parametrize("streaming", [False, True], ids=["unary", "stream"])
async def test_an_unavailable_server_is_tried_again(connect: Connect, streaming: bool) -> None:
    async with served() as s, connect(s.port) as client:
        s.engine.refusals = [DrainingError()]
        s.engine.script = [token(1), finished()]
        generation = await (call(client.stream("hi"), "read") if streaming else call(client, "generate", "hi"))

    assert generation.text == "t1 "
    assert len(s.engine.requests) == 2


@both
async def test_a_stream_that_has_begun_is_not_tried_again(connect: Connect) -> None:
    """The text that was already handed out cannot be taken back."""
    async with served() as s, connect(s.port) as client:
        stream = client.stream("hi", request_id="r1")
        await next_delta(stream)
        s.engine.streams["r1"].fail(DrainingError())
        with pytest.raises(UnavailableError) as caught:
            await call(stream, "read")

    assert caught.value.reason == "DRAINING"
    assert len(s.engine.requests) == 1


@both
async def test_one_attempt_means_one(connect: Connect) -> None:
    async with served() as s, connect(s.port, max_attempts=1) as client:
        s.engine.refusals = [DrainingError()]
        with pytest.raises(UnavailableError):
            await call(client, "generate", "hi")

    assert len(s.engine.requests) == 1


@both
async def test_an_aborted_stream_ends_as_cancelled_with_what_it_had(connect: Connect) -> None:
    async with served() as s, connect(s.port) as client:
        s.engine.script = [token(1), finished(FinishReason.CANCELLED, output_tokens=1)]
        generation = await call(client.stream("hi"), "read")

    assert generation.finish_reason is FinishReason.CANCELLED
    assert generation.text == "t1 "


@both
async def test_closing_the_client_ends_its_streams(connect: Connect) -> None:
    async with served() as s:
        async with connect(s.port) as client:
            stream = client.stream("hi", request_id="r1")
            await next_delta(stream)
        await s.engine.abort_happened.wait()

        with pytest.raises((CallCancelledError, asyncio.CancelledError)):
            await call(stream, "read")


def test_a_stream_without_a_last_message_is_not_whole() -> None:
    assert Assembler().whole() is None


class _EmptyCall:
    """A server that ends a stream in good order, but without `finished`."""

    def __iter__(self) -> _EmptyCall:
        return self

    def __next__(self) -> None:
        raise StopIteration


def test_a_stream_that_ends_too_soon_is_an_error() -> None:
    from gralora_server.client import GenerationStream

    with pytest.raises(ServerError, match="without its last message"):
        GenerationStream(_EmptyCall()).read()
