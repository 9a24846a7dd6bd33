"""A request that is sent again under its id runs once, and whoever sent it gets the whole answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from support.fake_engine import FakeEngine, finished, token
from support.grpc_harness import Client, Served, ask, ask_once, failure, read_all, served

from gralora_runtime.errors import QueueFullError, StepFailedError
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
    async with served(LettingGoEngine()) as s:
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


def starting(deltas: list[Delta], started_ids: list[str], request_id: str = "r1") -> Callable[[], Any]:
    async def start() -> RequestStream:
        started_ids.append(request_id)
        stream = RequestStream(request_id, lambda _: None)
        for delta in deltas:
            stream.put(delta)
        return stream

    return start


async def use(kept: Repeats, request_id: str, deltas: list[Delta], runs: list[str]) -> list[int]:
    reading = await kept.open(asked(request_id), starting(deltas, runs, request_id))
    found = [token_id async for delta in reading for token_id in delta.token_ids]
    await reading.aclose()
    return found


async def test_after_the_window_it_runs_again() -> None:
    kept, runs = Repeats(window_s=0.0), list[str]()
    await use(kept, "r1", ANSWER, runs)
    while kept._records:  # noqa: ASYNC110  # a timer of its own
        await asyncio.sleep(0)
    await use(kept, "r1", ANSWER, runs)

    assert runs == ["r1", "r1"]


async def test_an_answer_that_is_too_long_is_not_kept_but_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeats, "MAX_ANSWER_BYTES", 1000)
    kept, runs = Repeats(), list[str]()
    long = [*(Delta(token_ids=(number,), logprobs=(TokenLogprob(number, -1.0),)) for number in range(50)), finished()]
    reading = await kept.open(asked(), starting([], runs))
    found: list[int] = []
    for delta in long:
        reading._stream.put(delta)
        found += (await anext(reading)).token_ids
        assert len(reading._record.deltas) <= 4
    await reading.aclose()

    assert found == list(range(50))
    assert (kept._records, kept._num_bytes) == ({}, 0)


@pytest.mark.parametrize(("limit", "value"), [("MAX_ANSWERS", 3), ("MAX_BYTES", 3 * (4 * 400 + 3 * 44))])
async def test_only_so_many_answers_are_kept_and_the_oldest_go(
    limit: str, value: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repeats, limit, value)
    kept, runs = Repeats(), list[str]()
    for number in range(5):
        deltas = [Delta(text="tttt", token_ids=(number,)) for _ in range(3)]
        stream: Any = await kept.open(asked(f"r{number}"), starting([], runs, f"r{number}"))
        for delta in [*deltas, finished()]:
            stream._stream.put(delta)
            await anext(stream)
    assert [key.request_id for key in kept._records] == ["r2", "r3", "r4"]
    await use(kept, "r4", [], runs)

    assert runs == ["r0", "r1", "r2", "r3", "r4"]


async def test_two_at_the_same_moment_are_one_and_if_the_first_gives_up_the_second_asks() -> None:
    kept, runs = Repeats(), list[str]()
    waiting = asyncio.Event()

    async def never() -> RequestStream:
        waiting.set()
        await asyncio.Event().wait()
        raise AssertionError

    first = asyncio.ensure_future(kept.open(asked(), never))
    await waiting.wait()
    second = asyncio.ensure_future(use(kept, "r1", ANSWER, runs))
    await asyncio.sleep(0)
    assert runs == []
    first.cancel()

    assert await asyncio.wait_for(second, 10) == TOKENS
    assert runs == ["r1"]


async def test_tenants_share_no_answers() -> None:
    kept, runs = Repeats(), list[str]()
    mine = await kept.open(asked(tenant="a"), starting(ANSWER, runs))
    others = await kept.open(asked(tenant="b"), starting(ANSWER, runs))
    async for _ in mine:
        pass
    async for _ in others:
        pass

    assert runs == ["r1", "r1"]


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
