"""Streams of KServe's protocol: many requests on one, their answers among each other, and all ways in which it ends."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator

import grpc
import pytest
from support.call_lines import call_lines
from support.fake_engine import finished, token
from support.grpc_harness import Served, failure
from support.kserve import Talk, infer, is_final, kserve_served, said
from support.tenants import OWN, THEIRS, as_, furnish, two_tenants

from gralora.foreign import kserve_pb2
from gralora_runtime.errors import AdapterNotFoundError, NumericalError
from gralora_runtime.request import FinishReason
from gralora_server.kserve.stream import serve_each
from gralora_server.tenants.settings import TenancySettings

Code = grpc.StatusCode
METHOD = "/inference.GRPCInferenceService/ModelStreamInfer"
FINAL_WANTED = {"triton_enable_empty_final_response": True}
LONG_S = 3600.0


async def begun(s: Served, count: int) -> list[str]:
    """The engine's ids of so many requests, as they came to it."""
    return [await asyncio.wait_for(s.engine.submitted.get(), 10) for _ in range(count)]


def texts(messages: list[kserve_pb2.ModelStreamInferResponse]) -> list[str]:
    return [str(said(message.infer_response)["text_output"]) for message in messages]


# --- answers


async def test_pieces_come_as_tokens_do_and_the_last_one_says_so() -> None:
    async with kserve_served() as s:
        talk = Talk(s.client)
        await talk.send(infer(model="poet", id="7", stream=True))
        (request_id,) = await begun(s, 1)
        s.engine.streams[request_id].put(token(1))
        first = await talk.read()
        for delta in (token(2), finished(output_tokens=2)):
            s.engine.streams[request_id].put(delta)
        rest = await talk.answers()
        code = await talk.call.code()

    messages = [first, *rest]
    assert "".join(texts(messages)) == "t1 t2 "
    assert [is_final(message.infer_response) for message in messages] == [False] * (len(messages) - 1) + [True]
    assert {(m.error_message, m.infer_response.id, m.infer_response.model_version) for m in messages} == {
        ("", "7", "2")
    }
    assert code is Code.OK


async def test_an_empty_final_answer_is_for_those_who_ask() -> None:
    async with kserve_served() as s:
        s.engine.script = [token(1), finished(output_tokens=1)]
        talk = Talk(s.client)
        await talk.send(infer(id="7", stream=True, parameters=FINAL_WANTED))
        *pieces, last = await talk.answers()

    assert "".join(texts(pieces)) == "t1 "
    assert not any(is_final(piece.infer_response) for piece in pieces)
    assert is_final(last.infer_response)
    assert (list(last.infer_response.outputs), last.infer_response.id) == ([], "7")


async def test_without_pieces_a_request_has_one_answer_after_its_prompt() -> None:
    async with kserve_served() as s:
        s.engine.script = [token(1), token(2), finished(output_tokens=2)]
        talk = Talk(s.client)
        await talk.send(infer(id="7", outputs=["text_output", "num_output_tokens"]))
        (message,) = await talk.answers()

    assert said(message.infer_response) == {"text_output": "hellot1 t2 ", "num_output_tokens": 2}
    assert is_final(message.infer_response)


async def test_counts_and_reasons_of_pieces_are_their_own() -> None:
    outputs = ["finish_reason", "num_input_tokens", "num_output_tokens"]
    async with kserve_served() as s:
        talk = Talk(s.client)
        await talk.send(infer(stream=True, outputs=outputs))
        (request_id,) = await begun(s, 1)
        s.engine.streams[request_id].put(token(1))
        first = await talk.read()
        s.engine.streams[request_id].put(finished(FinishReason.STOP, output_tokens=1))
        (last,) = await talk.answers()

    assert said(first.infer_response) == {"finish_reason": "None", "num_input_tokens": 3, "num_output_tokens": 1}
    assert said(last.infer_response) == {"finish_reason": "stop", "num_input_tokens": 3, "num_output_tokens": 0}


async def test_requests_of_one_stream_run_side_by_side() -> None:
    async with kserve_served() as s:
        talk = Talk(s.client)
        await talk.send(infer("a", id="first", stream=True), infer("b", id="second", stream=True))
        first, second = await begun(s, 2)
        s.engine.streams[second].put(token(2))
        of_second = await talk.read()
        s.engine.streams[first].put(token(1))
        of_first = await talk.read()
        for request_id in (first, second):
            s.engine.streams[request_id].put(finished())
        rest = await talk.answers()

    assert (of_second.infer_response.id, of_first.infer_response.id) == ("second", "first")
    assert sorted(message.infer_response.id for message in rest) == ["first", "second"]


async def test_a_request_may_come_after_another_was_answered() -> None:
    async with kserve_served() as s:
        s.engine.script = [token(1), finished()]
        talk = Talk(s.client)
        await talk.send(infer("a", id="1"))
        first = await talk.read()
        await talk.send(infer("b", id="2"))
        (second,) = await talk.answers()

    assert texts([first, second]) == ["at1 ", "bt1 "]


async def test_many_requests_are_all_answered() -> None:
    """More than are served at once."""
    async with kserve_served() as s:
        s.engine.script = [token(1), finished()]
        talk = Talk(s.client)
        for number in range(200):
            await talk.send(infer(id=str(number)))
        messages = await talk.answers()

    assert sorted(int(message.infer_response.id) for message in messages) == list(range(200))
    assert set(texts(messages)) == {"hellot1 "}


# --- errors


async def test_an_error_is_a_message_with_its_reason_and_others_go_on() -> None:
    async with kserve_served() as s:
        talk = Talk(s.client)
        await talk.send(infer(id="good", stream=True))
        (good,) = await begun(s, 1)
        s.engine.refusals = [AdapterNotFoundError("nobody")]
        await talk.send(infer(id="absent", model="nobody", parameters=FINAL_WANTED))
        absent = await talk.read()
        await talk.send(infer(id="wrong", sampling={"temperature": "hot"}))
        wrong = await talk.read()
        for delta in (token(1), finished()):
            s.engine.streams[good].put(delta)
        rest = await talk.answers()
        code = await talk.call.code()

    assert absent.error_message == "ADAPTER_NOT_FOUND: no adapter named 'nobody' is registered"
    assert wrong.error_message == "INVALID_REQUEST: temperature: must be a number (got 'hot')"
    assert [(m.infer_response.id, is_final(m.infer_response)) for m in (absent, wrong)] == [
        ("absent", True), ("wrong", True)
    ]  # fmt: skip
    assert "".join(texts(rest)) == "t1 "
    assert code is Code.OK


async def test_an_error_may_come_after_some_pieces() -> None:
    async with kserve_served() as s:
        talk = Talk(s.client)
        await talk.send(infer(id="7", stream=True))
        (request_id,) = await begun(s, 1)
        s.engine.streams[request_id].put(token(1))
        piece = await talk.read()
        s.engine.streams[request_id].fail(NumericalError(request_id, "", "NaN"))
        (last,) = await talk.answers()

    assert texts([piece]) == ["t1 "]
    assert last.error_message.startswith("NON_FINITE_LOGITS: ")


async def test_our_own_bug_is_hidden_and_ends_its_request_alone(caplog: pytest.LogCaptureFixture) -> None:
    async with kserve_served() as s:
        s.engine.refusals = [RuntimeError("secret")]
        talk = Talk(s.client)
        await talk.send(infer(id="1"))
        broken = await talk.read()
        s.engine.script = [finished()]
        await talk.send(infer(id="2"))
        (good,) = await talk.answers()

    assert broken.error_message.startswith("INTERNAL: internal error ")
    assert "secret" not in broken.error_message
    assert good.error_message == ""
    assert any(record.exc_info is not None for record in caplog.records)


async def test_junk_ends_the_stream_and_all_that_runs_on_it() -> None:
    async with kserve_served() as s:
        call = s.client.channel.stream_stream(METHOD)()
        await call.write(infer(stream=True).SerializeToString())
        (request_id,) = await begun(s, 1)
        await call.write(b"\xff\xff\xff")
        failed = await failure(call.read())
        await asyncio.wait_for(s.engine.abort_happened.wait(), 10)

    assert (failed.code, failed.fields) == (Code.INVALID_ARGUMENT, ["request"])
    assert s.engine.aborted == [request_id]


# --- endings


async def test_a_client_that_leaves_ends_all_its_generations() -> None:
    async with kserve_served() as s:
        talk = Talk(s.client)
        await talk.send(*(infer(stream=True) for _ in range(3)))
        request_ids = await begun(s, 3)
        talk.call.cancel()
        while len(s.engine.aborted) < 3:
            await asyncio.wait_for(s.engine.abort_happened.wait(), 10)
            s.engine.abort_happened.clear()

    assert sorted(s.engine.aborted) == sorted(request_ids)


async def test_a_client_that_stops_reading_is_ended_by_a_status() -> None:
    async with kserve_served(write_timeout_s=0.2, channel_options=(("grpc.http2.bdp_probe", 0),)) as s:
        talk = Talk(s.client)
        await talk.send(infer(id="1", stream=True), infer(id="2", stream=True))
        request_ids = await begun(s, 2)
        streams = [s.engine.streams[request_id] for request_id in request_ids]
        while not s.engine.abort_happened.is_set():  # as fast as the server takes it
            for stream in streams:
                if not (stream._unread or stream._ended):
                    stream.put(token(1, "x" * (64 << 10)))
            await asyncio.sleep(0)
        failed = await failure(read_on(talk))

    assert (failed.code, failed.info.reason) == (Code.RESOURCE_EXHAUSTED, "SLOW_CONSUMER")
    assert sorted(s.engine.aborted) == sorted(request_ids)


async def read_on(talk: Talk) -> None:
    while await talk.call.read() is not grpc.aio.EOF:
        pass


async def test_a_drain_lets_what_runs_finish_and_then_ends_the_stream() -> None:
    async with kserve_served() as s:
        talk = Talk(s.client)
        await talk.send(infer(id="7", stream=True))
        (request_id,) = await begun(s, 1)
        drain = asyncio.ensure_future(s.server.drain(LONG_S))
        await s.engine.draining.wait()
        refused = await failure(Talk(s.client).call.read())
        for delta in (token(1), finished()):
            s.engine.streams[request_id].put(delta)
        messages = [await talk.read()]
        while not is_final(messages[-1].infer_response):
            messages.append(await talk.read())
        ended = await failure(talk.call.read())
        await asyncio.wait_for(drain, 10)

    assert "".join(texts(messages)) == "t1 "
    assert {(f.code, f.info.reason) for f in (refused, ended)} == {(Code.UNAVAILABLE, "DRAINING")}
    assert s.engine.aborted == []


async def test_past_the_grace_each_request_is_told_why_it_ends() -> None:
    async with kserve_served() as s:
        talk = Talk(s.client)
        await talk.send(infer(id="1", stream=True), infer(id="2"))
        request_ids = await begun(s, 2)
        await asyncio.wait_for(s.server.drain(0.05), 10)
        messages = [await talk.read(), await talk.read()]
        ended = await failure(talk.call.read())

    assert {message.error_message for message in messages} == {"DRAINING: the server is shutting down"}
    assert sorted(message.infer_response.id for message in messages) == ["1", "2"]
    assert (ended.code, ended.info.reason) == (Code.UNAVAILABLE, "DRAINING")
    assert sorted(s.engine.aborted) == sorted(request_ids)


async def test_a_silent_stream_ends_with_the_drain() -> None:
    async with kserve_served() as s:
        s.engine.script = [finished()]
        talk = Talk(s.client)
        await talk.send(infer())
        await talk.read()
        await asyncio.wait_for(s.server.drain(LONG_S), 10)
        ended = await failure(talk.call.read())

    assert (ended.code, ended.info.reason) == (Code.UNAVAILABLE, "DRAINING")


# --- rights and the log


async def test_another_tenants_adapter_is_refused_as_one_that_there_is_not() -> None:
    async with kserve_served(tenancy=two_tenants()) as s:
        furnish(s)
        s.engine.script = [finished()]
        talk = Talk(s.client, metadata=as_("acme"))
        for name in (THEIRS, "bob/absent", OWN):
            await talk.send(infer(model=name, id=name))
        messages = {message.infer_response.id: message.error_message for message in await talk.answers()}

    assert messages[OWN] == ""
    assert messages[THEIRS].replace(THEIRS, "") == messages["bob/absent"].replace("bob/absent", "")
    assert messages[THEIRS].startswith("ADAPTER_NOT_FOUND: ")


async def test_who_may_not_call_any_more_gets_nothing_more_on_an_open_stream() -> None:
    async with kserve_served(tenancy=two_tenants()) as s:
        furnish(s)
        s.engine.script = [finished()]
        talk = Talk(s.client, metadata=as_("acme"))
        await talk.send(infer(model=OWN, id="1"))
        before = await talk.read()
        s.server.tenancy.replace(TenancySettings(admin_tokens=two_tenants().admin_tokens))
        await talk.send(infer(model=OWN, id="2"))
        (after,) = await talk.answers()

    assert before.error_message == ""
    assert after.error_message.startswith("UNAUTHENTICATED: ")
    assert len(s.engine.requests) == 1


async def test_each_generation_has_its_line_and_the_call_has_one(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="gralora_server.calls")
    async with kserve_served() as s:
        s.engine.script = [finished()]
        talk = Talk(s.client)
        await talk.send(infer(model="poet", id="1"))
        await talk.read()
        await talk.send(infer(id="2", sampling={"early_exit": 1}))
        await talk.answers()
        await talk.call.code()
    lines = call_lines(caplog)

    (request,) = s.engine.requests
    assert [(line["method"], line["adapter"], line["request_id"], line["code"]) for line in lines] == [
        (METHOD, "poet@2", request.request_id, "OK"),
        (METHOD, "fake", "2", "INVALID_ARGUMENT"),
        (METHOD, "", "", "OK"),
    ]


# --- so many at once


class Requests:
    """Numbers, without end. Counts those that were read."""

    def __init__(self) -> None:
        self.num_read = 0

    def __aiter__(self) -> AsyncIterator[int]:
        return self

    async def __anext__(self) -> int:
        self.num_read += 1
        return self.num_read


async def test_no_more_is_read_than_is_served_at_once() -> None:
    requests, served, may_end = Requests(), asyncio.Semaphore(0), asyncio.Semaphore(0)

    async def serve(_number: int) -> None:
        served.release()
        await may_end.acquire()

    serving = asyncio.ensure_future(serve_each(requests, serve, at_once=3, until=asyncio.Event()))
    for _ in range(3):
        await served.acquire()
    await settled()
    at_first = requests.num_read
    may_end.release()
    await served.acquire()
    await settled()
    serving.cancel()

    assert (at_first, requests.num_read) == (3, 4)


async def settled() -> None:
    """All that can happen without anything new has."""
    for _ in range(20):
        await asyncio.sleep(0)


async def test_what_one_raises_ends_all_others() -> None:
    ended: list[int] = []

    async def serve(number: int) -> None:
        if number == 3:
            raise ValueError("three")
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(number)

    with pytest.raises(ValueError, match="three"):
        await serve_each(Requests(), serve, at_once=3, until=asyncio.Event())

    assert sorted(ended) == [1, 2]


async def test_when_it_is_to_end_nothing_more_is_read_and_what_runs_is_waited_for() -> None:
    requests, until, may_end, served = Requests(), asyncio.Event(), asyncio.Event(), asyncio.Semaphore(0)

    async def serve(_number: int) -> None:
        served.release()
        await may_end.wait()

    serving = asyncio.ensure_future(serve_each(requests, serve, at_once=2, until=until))
    await served.acquire()
    await served.acquire()
    until.set()
    await settled()
    was_waiting = not serving.done()
    may_end.set()

    assert was_waiting
    assert await serving is False
    assert requests.num_read == 2
