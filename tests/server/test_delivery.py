"""Merging and writing, without a network."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest
from support.fake_engine import finished, token

from gralora.v1 import generation_pb2
from gralora_runtime.errors import DeadlineExceededError
from gralora_runtime.request import Delta, Started
from gralora_runtime.stream import RequestStream
from gralora_server.delivery import collect, deliver, merged
from gralora_server.errors import StalledClientError
from gralora_server.servicers import writing

STARTED = Delta(
    started=Started(prompt_tokens=1, cached_tokens=0, queue_time_s=0, seed=1, adapter="", adapter_digest="")
)


async def stream(*deltas: Delta, error: Exception | None = None) -> AsyncIterator[Delta]:
    for delta in deltas:
        yield delta
    if error is not None:
        raise error


async def sizes(min_tokens: int, *deltas: Delta) -> list[int]:
    return [len(delta.token_ids) async for delta in merged(stream(*deltas), min_tokens=min_tokens)]


async def test_the_first_and_the_last_never_wait() -> None:
    tokens = [token(index) for index in range(5)]

    assert await sizes(3, STARTED, *tokens, finished()) == [0, 3, 2]


async def test_one_token_a_message_by_default() -> None:
    assert await sizes(1, STARTED, token(1), token(2), finished()) == [0, 1, 1, 0]


async def test_text_without_tokens_waits_for_company() -> None:
    """A stop string that did not come true frees text that no token goes with."""
    parts = [delta async for delta in merged(stream(token(1, "a"), Delta(text="b"), token(2, "c")), min_tokens=2)]

    assert [part.text for part in parts] == ["abc"]


async def test_a_generation_of_one_message_has_everything_on_it() -> None:
    whole = Delta(text="a", token_ids=(1,), started=STARTED.started, finished=finished().finished)
    written: list[Delta] = []

    async def write(delta: Delta) -> None:
        written.append(delta)

    await deliver(stream(whole), write, request_id="r1", min_tokens=8, write_timeout_s=10)

    assert written == [whole]


async def test_a_write_that_is_not_taken_in_time_is_a_stalled_client() -> None:
    async def write(_delta: Delta) -> None:
        await asyncio.Event().wait()

    with pytest.raises(StalledClientError, match="r1"):
        await deliver(stream(STARTED), write, request_id="r1", min_tokens=1, write_timeout_s=0.01)


async def test_a_message_to_a_client_that_left_is_no_bug_of_ours() -> None:
    class Context:
        async def write(self, _message: generation_pb2.StreamGenerateResponse) -> None:
            raise grpc.aio.InternalError("Failed execute_batch")

    with pytest.raises(asyncio.CancelledError):
        await writing(Context(), "r1")(STARTED)


async def test_the_first_message_alone_says_the_request_s_id() -> None:
    written: list[generation_pb2.StreamGenerateResponse] = []

    class Context:
        async def write(self, message: generation_pb2.StreamGenerateResponse) -> None:
            written.append(message)

    write = writing(Context(), "r1")
    await write(STARTED)
    await write(finished())

    assert [message.request_id for message in written] == ["r1", ""]


async def test_what_was_generated_before_an_error_is_not_delivered_half_merged() -> None:
    """The status says that the generation failed; a client that wants each token asks for no merging."""
    written: list[list[int]] = []

    async def write(delta: Delta) -> None:
        written.append(list(delta.token_ids))

    failing = stream(STARTED, token(1), token(2), token(3), error=DeadlineExceededError("r1"))
    with pytest.raises(DeadlineExceededError):
        await deliver(failing, write, request_id="r1", min_tokens=2, write_timeout_s=10)

    assert written == [[], [1, 2]]


async def test_collecting_joins_everything() -> None:
    whole = await collect(stream(STARTED, token(1, "a"), token(2, "b"), finished(output_tokens=2)))

    assert whole.text == "ab"
    assert whole.token_ids == (1, 2)
    assert whole.started is STARTED.started
    assert whole.finished.output_tokens == 2


async def everybody_else() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_messages_hold_more_tokens_while_the_client_is_behind_and_one_when_there_is_room() -> None:
    """Nothing is lost and nothing changes places; the engine never waits."""
    tokens = RequestStream("r1", lambda _: None)
    sizes: list[int] = []
    received: list[int] = []
    room = asyncio.Event()

    async def write(delta: Delta) -> None:
        await room.wait()
        sizes.append(len(delta.token_ids))
        received.extend(delta.token_ids)

    delivering = asyncio.create_task(deliver(tokens, write, request_id="r1", min_tokens=1, write_timeout_s=10))
    for index in range(10):  # the first is being written, which takes as long as these
        tokens.put(token(index))
        await everybody_else()
    room.set()
    for index in range(10, 15):
        await everybody_else()
        tokens.put(token(index))
    await everybody_else()
    tokens.put(finished())
    await delivering

    assert received == list(range(15))
    assert sizes == [1, 9, *[1] * 5, 0]


async def test_a_write_that_takes_long_holds_the_request_until_the_client_reads_on() -> None:
    room, told = asyncio.Event(), asyncio.Queue[str]()

    async def write(_delta: Delta) -> None:
        await room.wait()

    delivering = asyncio.create_task(
        deliver(
            stream(STARTED, finished()),
            write,
            request_id="r1",
            min_tokens=1,
            write_timeout_s=60,
            hold_after_s=0.01,
            on_slow=lambda: told.put_nowait("slow"),
            on_read=lambda: told.put_nowait("read"),
        )
    )
    first = await told.get()
    room.set()
    await delivering

    assert first == "slow"
    assert [told.get_nowait() for _ in range(told.qsize())] == ["read", "read"]


async def test_a_stream_holds_its_request_once_and_lets_it_go_on_once() -> None:
    told: list[bool] = []
    tokens = RequestStream("r1", lambda _: None, lambda _, held: told.append(held))
    tokens.go_on()
    tokens.hold()
    tokens.hold()
    tokens.go_on()
    tokens.go_on()
    tokens.put(finished())
    tokens.hold()

    assert told == [True, False]
