"""A request that is sent again under its id runs once, and whoever sent it gets the whole answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from support.fake_engine import FakeEngine, finished, token
from support.grpc_harness import Client, Served, ask, ask_once, failure, read_all, served

from gralora_runtime.errors import GraloraError, QueueFullError, StepFailedError
from gralora_runtime.request import Delta, FinishReason, GenerationRequest, TokenLogprob
from gralora_runtime.stream import RequestStream
from gralora_server import repeats
from gralora_server.repeats import Asked, Repeats
from gralora_server.tenants.caller import Caller, set_current
from gralora_server.tenants.settings import Role

ANSWER = [token(1), token(2), token(3), finished(output_tokens=3)]
TOKENS = [1, 2, 3]


class LettingGoEngine(FakeEngine):
    """Has let go of an id that was aborted after a try or two."""

    tries_left = 2

    async def submit(self, request: GenerationRequest) -> RequestStream:
        if request.request_id in self.aborted:
            self.tries_left -= 1
            if self.tries_left == 0:
                self.aborted.remove(request.request_id)
                del self.streams[request.request_id]
        return await super().submit(request)


def tokens(messages: list[Any]) -> list[int]:
    return [token_id for message in messages for token_id in message.token_ids]


def answer(s: Served, deltas: list[Delta] = ANSWER) -> None:
    for delta in deltas:
        s.engine.streams["r1"].put(delta)


async def test_who_asks_again_while_it_runs_gets_it_from_its_beginning() -> None:
    async with served() as s:
        first = s.client.generation.StreamGenerate(ask())
        head = [await first.read()]
        answer(s, ANSWER[:2])
        head.append(await first.read())
        second = s.client.generation.StreamGenerate(ask())
        early = await second.read()
        third = asyncio.ensure_future(whole(s.client))
        answer(s, ANSWER[2:])
        answers = [head + await read_all(first), [early, *await read_all(second)]]
        once = await third

    assert [tokens(messages) for messages in answers] == [TOKENS] * 2
    assert all(messages[0].HasField("started") and messages[-1].HasField("finished") for messages in answers)
    assert list(once.token_ids) == TOKENS
    assert len(s.engine.requests) == 1
    assert s.engine.aborted == []


async def whole(client: Client) -> Any:
    return await client.generation.Generate(ask_once())


async def test_who_asks_again_after_its_end_gets_it_again_for_a_while() -> None:
    async with served() as s:
        s.engine.script = ANSWER
        answers = [await whole(s.client) for _ in range(3)]
        streamed = await read_all(s.client.generation.StreamGenerate(ask()))

    assert answers[0] == answers[1] == answers[2]
    assert tokens(streamed) == TOKENS
    assert len(s.engine.requests) == 1


async def test_while_somebody_reads_it_goes_on_when_the_first_one_leaves() -> None:
    """Whoever lost its connection asks again before the server has noticed."""
    async with served() as s:
        first = s.client.generation.StreamGenerate(ask())
        await first.read()
        second = s.client.generation.StreamGenerate(ask())
        messages = [await second.read()]
        first.cancel()
        await first.code()
        answer(s)
        messages += await read_all(second)

    assert tokens(messages) == TOKENS
    assert s.engine.aborted == []


async def test_when_all_have_left_it_ends_and_sent_again_it_runs_anew() -> None:
    """The engine lets go of a request at its next step, and would call the id in use until then."""
    async with served(engine=LettingGoEngine()) as s:
        call = s.client.generation.StreamGenerate(ask())
        await call.read()
        call.cancel()
        await asyncio.wait_for(s.engine.abort_happened.wait(), 10)
        s.engine.script = ANSWER
        again = await whole(s.client)

    assert list(again.token_ids) == TOKENS


async def test_another_request_under_the_id_is_refused_while_that_runs_and_served_afterwards() -> None:
    async with served() as s:
        running = s.client.generation.StreamGenerate(ask())
        await running.read()
        failed = await failure(s.client.generation.Generate(ask_once(adapter="poet")))
        answer(s)
        await read_all(running)
        del s.engine.streams["r1"]
        s.engine.script = [token(9), finished(output_tokens=1)]
        other = await s.client.generation.Generate(ask_once(adapter="poet"))

    assert failed.fields == ["request_id"]
    assert list(other.token_ids) == [9]


async def test_requests_whose_id_the_server_makes_are_all_their_own() -> None:
    async with served() as s:
        s.engine.script = ANSWER
        await asyncio.gather(*(s.client.generation.Generate(ask_once("")) for _ in range(3)))

    assert len({request.request_id for request in s.engine.requests}) == 3


@pytest.mark.parametrize("end", ["refused", "failed", "deadline", "cancelled"])
async def test_what_came_to_no_good_end_runs_again(end: str) -> None:
    async with served() as s:
        if end == "refused":
            s.engine.refusals = [QueueFullError(1, retry_after_s=1.0)]
            await failure(whole(s.client))
        else:
            call = s.client.generation.StreamGenerate(ask())
            await call.read()
            stream = s.engine.streams.pop("r1")
            if end == "failed":
                stream.fail(StepFailedError("e"))
                await failure(read_all(call))
            else:
                stream.put(finished(FinishReason(end)))
                await read_all(call)
        s.engine.script = ANSWER

        assert list((await whole(s.client)).token_ids) == TOKENS


# Without a wire.


def asked(request_id: str = "r1", digest: bytes = b"d", tenant: str = "") -> Asked:
    return Asked(tenant, request_id, digest)


class Runs:
    """Of requests that answer so. Each is left once, with the error that ended it."""

    def __init__(self, deltas: list[Delta] = ANSWER) -> None:
        self.deltas = deltas
        self.begun: list[str] = []
        self.ends: list[BaseException | None] = []
        self.streams: list[RequestStream] = []
        self.holds: list[bool] = []

    def of(self, request_id: str = "r1") -> Callable[[], Any]:
        @asynccontextmanager
        async def run() -> AsyncIterator[RequestStream]:
            self.begun.append(request_id)
            stream = RequestStream(request_id, lambda _: None, lambda _, held: self.holds.append(held))
            self.streams.append(stream)
            for delta in self.deltas:
                stream.put(delta)
            try:
                yield stream
            except GraloraError as error:
                self.ends.append(error)
                raise
            else:
                self.ends.append(None)
            finally:
                await stream.aclose()

        return run

    async def use(self, kept: Repeats, request_id: str = "r1") -> list[int]:
        async with kept.answer(asked(request_id), self.of(request_id)) as reading:
            return [token_id async for delta in reading for token_id in delta.token_ids]


async def test_after_the_window_it_runs_again() -> None:
    kept, runs = Repeats(window_s=0.0), Runs()
    await runs.use(kept)
    while kept._records:  # noqa: ASYNC110  # a timer of its own
        await asyncio.sleep(0)
    await runs.use(kept)

    assert runs.begun == ["r1", "r1"]


async def test_a_run_is_left_at_its_end_whoever_reads_on() -> None:
    """A tenant's account has it until then."""
    kept, runs = Repeats(), Runs()
    async with kept.answer(asked(), runs.of()) as first, kept.answer(asked(), runs.of()) as second:
        await anext(first)
        assert runs.ends == [None]
        assert (await anext(second)).finished is not None
    assert await runs.use(kept) == TOKENS

    assert runs.begun == ["r1"]
    assert runs.ends == [None]


async def test_a_run_is_left_with_the_error_that_ended_it_and_all_its_readers_hear_of_it() -> None:
    kept, runs, error = Repeats(), Runs([]), StepFailedError("e")
    async with kept.answer(asked(), runs.of()) as first, kept.answer(asked(), runs.of()) as second:
        runs.streams[0].fail(error)
        for reading in (first, second):
            with pytest.raises(StepFailedError):
                await anext(reading)

    assert runs.ends == [error]
    assert kept._records == {}


async def test_a_client_that_is_slow_holds_a_request_only_while_it_is_alone() -> None:
    kept, runs = Repeats(), Runs([])
    async with kept.answer(asked(), runs.of()) as first:
        first.hold()
        assert runs.holds == [True]
        async with kept.answer(asked(), runs.of()) as second:
            assert runs.holds == [True, False]
            second.hold()
        assert runs.holds == [True, False]
        first.hold()

    assert runs.holds == [True, False, True]


async def test_an_answer_that_is_too_long_is_not_kept_but_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeats, "MAX_ANSWER_BYTES", 1000)
    kept, runs = Repeats(), Runs([])
    long = [*(Delta(token_ids=(number,), logprobs=(TokenLogprob(number, -1.0),)) for number in range(50)), finished()]
    found: list[int] = []
    async with kept.answer(asked(), runs.of()) as reading:
        for delta in long:
            runs.streams[0].put(delta)
            found += (await anext(reading)).token_ids
            assert len(reading._record.deltas) <= 4

    assert found == list(range(50))
    assert (kept._records, kept._num_bytes) == ({}, 0)


@pytest.mark.parametrize(("limit", "value"), [("MAX_ANSWERS", 3), ("MAX_BYTES", 3 * (4 * 400 + 3 * 44))])
async def test_only_so_many_answers_are_kept_and_the_oldest_go(
    limit: str, value: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repeats, limit, value)
    kept, runs = Repeats(), Runs([])
    for number in range(5):
        async with kept.answer(asked(f"r{number}"), runs.of(f"r{number}")) as reading:
            for delta in [*(Delta(text="tttt", token_ids=(number,)) for _ in range(3)), finished()]:
                runs.streams[-1].put(delta)
                await anext(reading)
    assert [key.request_id for key in kept._records] == ["r2", "r3", "r4"]
    await runs.use(kept, "r4")

    assert runs.begun == ["r0", "r1", "r2", "r3", "r4"]


async def test_two_at_the_same_moment_are_one_and_if_the_first_gives_up_the_second_asks() -> None:
    kept, runs = Repeats(), Runs()
    waiting = asyncio.Event()

    @asynccontextmanager
    async def never() -> AsyncIterator[RequestStream]:
        waiting.set()
        await asyncio.Event().wait()
        yield runs.streams[0]

    async def ask_in_vain() -> None:
        async with kept.answer(asked(), never):
            raise AssertionError

    first = asyncio.ensure_future(ask_in_vain())
    await waiting.wait()
    second = asyncio.ensure_future(runs.use(kept))
    await asyncio.sleep(0)
    assert runs.begun == []
    first.cancel()

    assert await asyncio.wait_for(second, 10) == TOKENS
    assert runs.begun == ["r1"]


async def test_tenants_share_no_answers() -> None:
    kept, runs = Repeats(), Runs()
    for tenant in ("a", "b"):
        async with kept.answer(asked(tenant=tenant), runs.of()) as reading:
            async for _ in reading:
                pass

    assert runs.begun == ["r1", "r1"]


def test_what_was_asked_has_the_callers_tenant_and_every_field_of_the_request() -> None:
    set_current(Caller("acme", Role.GENERATE))
    try:
        one, other = repeats.asked_for(ask()), repeats.asked_for(ask(canary_key="k"))
    finally:
        set_current(Caller("", Role.ADMIN))

    assert one == other
    assert one is not None
    assert other is not None
    assert one.tenant == "acme"
    assert one.digest != other.digest
    assert one.digest == repeats.asked_for(ask_once()).digest  # type: ignore[union-attr]
    assert repeats.asked_for(ask("")) is None
