"""GenerationService over a real socket: what goes in, what comes out, and how calls end."""

from __future__ import annotations

import asyncio
import json
import logging

import grpc
import pytest
from support.call_lines import call_lines
from support.fake_engine import finished, token
from support.grpc_harness import ask, ask_once, failure, read_all, served

from gralora.v1 import generation_pb2
from gralora_runtime.errors import (
    AdapterBusyError,
    AdapterCapacityError,
    AdapterNotFoundError,
    AdapterRejectedError,
    AdapterSourceError,
    DeadlineExceededError,
    DrainingError,
    InvalidRequestError,
    QueueFullError,
    RequestCancelledError,
)
from gralora_runtime.request import FinishReason
from gralora_server.generating import effective_timeout_s

Code = grpc.StatusCode


async def test_a_stream_is_deltas_with_started_first_and_finished_last() -> None:
    async with served() as s:
        call = s.client.generation.StreamGenerate(ask(adapter="poet"))
        first = await call.read()
        for delta in (token(1), token(2), finished(output_tokens=2)):
            s.engine.streams["r1"].put(delta)
        rest = await read_all(call)

    assert first.request_id == "r1"
    assert first.started.adapter == "poet"
    assert first.started.adapter_digest == "a" * 64
    assert first.started.seed == 2**64 - 1
    assert "".join(message.text for message in rest) == "t1 t2 "
    assert [token_id for message in rest for token_id in message.token_ids] == [1, 2]
    assert [False] * (len(rest) - 1) + [True] == [message.HasField("finished") for message in rest]
    assert not any(message.HasField("started") or message.request_id for message in rest)
    assert rest[-1].finished.reason == generation_pb2.FINISH_REASON_LENGTH
    assert rest[-1].finished.usage.output_tokens == 2


async def test_a_unary_answer_is_the_whole_generation() -> None:
    async with served() as s:
        s.engine.script = [token(1), token(2), finished(FinishReason.STOP, output_tokens=2, stop_string="END")]
        answer = await s.client.generation.Generate(ask_once())

    assert answer.request_id == "r1"
    assert answer.text == "t1 t2 "
    assert list(answer.token_ids) == [1, 2]
    assert answer.started.prompt_tokens == 3
    assert answer.finished.reason == generation_pb2.FINISH_REASON_STOP
    assert answer.finished.stop_string == "END"


async def test_metadata_arrives_at_admission_before_any_message() -> None:
    """A router learns that the request was taken, however long its first token takes."""
    async with served() as s:
        # The stream of this request is empty: not even `started` is there yet.
        s.engine.start_at_once = False
        call = s.client.generation.StreamGenerate(ask())

        await asyncio.wait_for(call.initial_metadata(), 10)

        assert not call.done()
        call.cancel()


async def test_tokens_are_merged_into_messages_of_at_least_the_asked_size() -> None:
    async with served() as s:
        request = ask(response=generation_pb2.ResponseParams(min_tokens_per_message=3))
        call = s.client.generation.StreamGenerate(request)
        await call.read()
        for token_id in range(1, 9):
            s.engine.streams["r1"].put(token(token_id))
            await asyncio.sleep(0)  # lets the server take each one alone
        s.engine.streams["r1"].put(finished(output_tokens=8))
        sizes = [len(message.token_ids) for message in await read_all(call)]

    assert sum(sizes) == 8
    assert all(size >= 3 for size in sizes[:-1])


async def test_an_empty_request_id_is_replaced_and_reported() -> None:
    async with served() as s:
        s.engine.script = [finished()]
        answer = await s.client.generation.Generate(ask_once(request_id=""))

    assert len(answer.request_id) == 32
    assert s.engine.requests[0].request_id == answer.request_id


async def test_a_request_id_that_is_running_is_refused() -> None:
    async with served() as s:
        running = s.client.generation.StreamGenerate(ask())
        await running.read()
        failed = await failure(s.client.generation.Generate(ask_once(adapter="poet")))
        running.cancel()

    assert failed.code is Code.INVALID_ARGUMENT
    assert failed.fields == ["request_id"]


async def test_a_cancelled_stream_is_aborted_in_the_engine() -> None:
    async with served() as s:
        call = s.client.generation.StreamGenerate(ask())
        await call.read()
        call.cancel()
        await asyncio.wait_for(s.engine.abort_happened.wait(), 10)

    assert s.engine.aborted == ["r1"]


async def test_a_cancelled_unary_call_is_aborted_in_the_engine() -> None:
    async with served() as s:
        call = s.client.generation.Generate(ask_once())
        await s.engine.submitted.get()
        call.cancel()
        await asyncio.wait_for(s.engine.abort_happened.wait(), 10)

    assert s.engine.aborted == ["r1"]


async def test_a_finished_stream_is_not_aborted() -> None:
    async with served() as s:
        s.engine.script = [token(1), finished()]
        await read_all(s.client.generation.StreamGenerate(ask()))

    assert s.engine.aborted == []


async def test_a_client_that_leaves_at_the_last_message_costs_nothing() -> None:
    """Routers drop the call as soon as they have seen `finished`; nothing may depend on what follows it."""
    async with served() as s:
        s.engine.script = [token(1), finished()]
        call = s.client.generation.StreamGenerate(ask())
        while not (await call.read()).HasField("finished"):
            pass
        call.cancel()
        again = await read_all(s.client.generation.StreamGenerate(ask("r2")))

    assert again[-1].HasField("finished")
    assert s.engine.aborted == []


async def test_the_deadline_reaches_the_engine_and_ends_the_call() -> None:
    async with served() as s:
        failed = await failure(s.client.generation.Generate(ask_once(), timeout=0.3))
        await asyncio.wait_for(s.engine.abort_happened.wait(), 10)

    assert failed.code is Code.DEADLINE_EXCEEDED
    assert 0 < s.engine.requests[0].timeout_s < 1
    assert s.engine.aborted == ["r1"]


@pytest.mark.parametrize("remaining_s", [0.0, -1.0])
def test_a_deadline_that_has_passed_on_arrival_is_refused(remaining_s: float) -> None:
    with pytest.raises(DeadlineExceededError, match="r1"):
        effective_timeout_s("r1", remaining_s, 60.0)


async def test_without_a_deadline_the_engine_gets_none() -> None:
    async with served() as s:
        s.engine.script = [finished()]
        await s.client.generation.Generate(ask_once())

    assert s.engine.requests[0].timeout_s is None


async def test_the_servers_limit_stands_in_for_a_missing_deadline_and_cuts_a_long_one() -> None:
    async with served(max_request_s=60) as s:
        s.engine.script = [finished()]
        await s.client.generation.Generate(ask_once())
        await s.client.generation.Generate(ask_once("r2"), timeout=3600)

    assert [request.timeout_s for request in s.engine.requests] == [60, 60]


REFUSALS = [
    (InvalidRequestError("text", "x" * 9, "is too long"), Code.INVALID_ARGUMENT, "INVALID_REQUEST", "BadRequest"),
    (AdapterNotFoundError("ghost"), Code.NOT_FOUND, "ADAPTER_NOT_FOUND", "ResourceInfo"),
    (AdapterRejectedError("p", ["DoRA", "bias"]), Code.FAILED_PRECONDITION, "ADAPTER_REJECTED", "ResourceInfo"),
    (AdapterBusyError("p", 3), Code.FAILED_PRECONDITION, "ADAPTER_BUSY", "ResourceInfo"),
    (AdapterCapacityError("p", 10, 5), Code.FAILED_PRECONDITION, "ADAPTER_CAPACITY", "ResourceInfo"),
    (AdapterSourceError("p", "hf://org", "is down"), Code.UNAVAILABLE, "ADAPTER_SOURCE", "ResourceInfo"),
    (QueueFullError("8 requests wait", 1.25), Code.RESOURCE_EXHAUSTED, "QUEUE_FULL", "RetryInfo"),
    (DeadlineExceededError("r1"), Code.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED", None),
    (RequestCancelledError("r1"), Code.CANCELLED, "CANCELLED", None),
    (DrainingError(), Code.UNAVAILABLE, "DRAINING", None),
]


@pytest.mark.parametrize(
    ("error", "code", "reason", "detail"), REFUSALS, ids=[type(row[0]).__name__ for row in REFUSALS]
)
@pytest.mark.parametrize("streaming", [False, True], ids=["unary", "stream"])
async def test_an_error_of_the_engine_becomes_a_status(error, code, reason, detail, streaming: bool) -> None:
    async with served() as s:
        s.engine.refusals = [error]
        if streaming:
            failed = await failure(read_all(s.client.generation.StreamGenerate(ask())))
        else:
            failed = await failure(s.client.generation.Generate(ask_once()))

    assert failed.code is code
    assert failed.message == str(error)
    assert failed.info.reason == reason
    assert failed.info.domain == "gralora.dev"
    assert dict(failed.info.metadata) == error.metadata()
    assert {"ErrorInfo", detail} - {None} == failed.details.keys()


async def test_a_full_queue_says_when_to_come_back() -> None:
    async with served() as s:
        s.engine.refusals = [QueueFullError("8 requests wait", 1.25)]
        failed = await failure(s.client.generation.Generate(ask_once()))

    assert failed.details["RetryInfo"].retry_delay.ToMilliseconds() == 1250
    assert failed.trailers["grpc-retry-pushback-ms"] == "1250"


async def test_grpcs_own_retry_policy_obeys_a_full_queue() -> None:
    """The trailer is one that a stock client acts upon: it comes back, and is served."""
    policy = {
        "maxAttempts": 3,
        "initialBackoff": "30s",
        "maxBackoff": "30s",
        "backoffMultiplier": 1,
        "retryableStatusCodes": ["RESOURCE_EXHAUSTED"],
    }
    config = {"methodConfig": [{"name": [{"service": "gralora.v1.GenerationService"}], "retryPolicy": policy}]}
    async with served(channel_options=(("grpc.service_config", json.dumps(config)),)) as s:
        s.engine.refusals = [QueueFullError("8 requests wait", 0.05)]
        s.engine.script = [finished()]
        answer = await s.client.generation.Generate(ask_once())

    assert answer.HasField("finished")
    assert len(s.engine.requests) == 2


async def test_a_failure_after_the_first_message_ends_the_stream_with_its_status() -> None:
    async with served() as s:
        call = s.client.generation.StreamGenerate(ask())
        await call.read()
        s.engine.streams["r1"].put(token(1))
        s.engine.streams["r1"].fail(DeadlineExceededError("r1"))
        seen: list[generation_pb2.StreamGenerateResponse] = []
        failed = await failure(read_all(call, seen))

    assert [list(message.token_ids) for message in seen] == [[1]]
    assert failed.code is Code.DEADLINE_EXCEEDED
    assert failed.info.reason == "DEADLINE_EXCEEDED"


@pytest.mark.parametrize("streaming", [False, True], ids=["unary", "stream"])
async def test_a_bug_is_internal_with_an_id_and_nothing_else(streaming: bool, caplog) -> None:
    async with served() as s:
        s.engine.refusals = [ZeroDivisionError("secret: /etc/passwd")]
        call = s.client.generation
        failed = await failure(read_all(call.StreamGenerate(ask())) if streaming else call.Generate(ask_once()))

    error_id = failed.info.metadata["error_id"]
    assert failed.code is Code.INTERNAL
    assert failed.message == f"internal error {error_id}; the server's log has the cause"
    assert "secret" not in str(failed)
    logged = next(record for record in caplog.records if error_id in record.getMessage())
    assert logged.exc_info[0] is ZeroDivisionError


@pytest.mark.parametrize("streaming", [False, True])
async def test_a_panic_of_a_library_is_a_bug_like_any_other(streaming: bool) -> None:
    """It is no `Exception`, so the client used to wait for a status until its deadline."""

    class PanicException(BaseException):
        pass

    async with served() as s:
        s.engine.refusals = [PanicException("index out of bounds")]
        call = s.client.generation
        asking = read_all(call.StreamGenerate(ask())) if streaming else call.Generate(ask_once())
        failed = await asyncio.wait_for(failure(asking), 10)

    assert failed.code is Code.INTERNAL


async def test_every_call_leaves_one_log_line(caplog) -> None:
    caplog.set_level(logging.INFO, logger="gralora_server.calls")
    async with served() as s:
        s.engine.script = [finished()]
        await read_all(s.client.generation.StreamGenerate(ask(adapter="poet")))
        await failure(s.client.generation.Generate(generation_pb2.GenerateRequest(request_id="bad\nline")))
    lines = call_lines(caplog)

    assert [line.pop("duration_ms") >= 0 for line in lines] == [True, True]
    assert lines == [
        lines[0]
        | {
            "method": "/gralora.v1.GenerationService/StreamGenerate",
            "request_id": "r1",
            "adapter": "poet@2",
            "version": 2,
            "code": "OK",
            "outcome": "stop",
        },
        {
            "method": "/gralora.v1.GenerationService/Generate",
            "request_id": "bad\nline",
            "adapter": "",
            "code": "INVALID_ARGUMENT",
        },
    ]


async def test_the_line_of_a_refused_call_says_nothing_of_the_request_that_has_its_id(caplog) -> None:
    caplog.set_level(logging.INFO, logger="gralora_server.calls")
    async with served() as s:
        running = s.client.generation.StreamGenerate(ask("r1"))
        await running.read()
        await failure(s.client.generation.Generate(ask_once("r1", adapter="poet")))
        (line,) = call_lines(caplog)
        timeline = s.engine.timelines.find("r1")
        assert timeline is not None
        assert timeline.left_s is None, "the other call has not ended"

    assert line["code"] == "INVALID_ARGUMENT"
    assert "outcome" not in line


async def test_a_cancelled_call_is_logged_as_cancelled(caplog) -> None:
    caplog.set_level(logging.INFO, logger="gralora_server.calls")
    async with served() as s:
        call = s.client.generation.StreamGenerate(ask())
        await call.read()
        call.cancel()
        await s.engine.abort_happened.wait()
    codes = [line["code"] for line in call_lines(caplog)]

    assert codes == ["CANCELLED"]


async def test_ten_megabytes_of_prompt_are_refused_and_the_server_serves_on() -> None:
    async with served() as s:
        huge = generation_pb2.GenerateRequest(text="x" * (10 << 20))
        failed = await failure(s.client.generation.Generate(huge))
        s.engine.script = [finished()]
        answer = await s.client.generation.Generate(ask_once())

    assert failed.code is Code.INVALID_ARGUMENT
    assert failed.fields == ["text"]
    assert failed.message == "text: must be at most 4194304 bytes of UTF-8 (got '10485760 bytes')"
    assert len(s.engine.requests) == 1
    assert answer.HasField("finished")


async def test_a_message_above_the_limit_is_refused_and_the_server_serves_on() -> None:
    async with served() as s:
        huge = generation_pb2.GenerateRequest(text="x" * (17 << 20))
        failed = await failure(s.client.generation.Generate(huge))
        s.engine.script = [finished()]
        answer = await s.client.generation.Generate(ask_once())

    assert failed.code is Code.RESOURCE_EXHAUSTED
    assert "larger than max" in failed.message
    assert answer.HasField("finished")


async def test_an_invalid_request_never_reaches_the_engine() -> None:
    async with served() as s:
        sampling = generation_pb2.SamplingParams(temperature=-1)
        failed = await failure(s.client.generation.Generate(ask_once(sampling=sampling)))

    assert failed.code is Code.INVALID_ARGUMENT
    assert failed.fields == ["sampling.temperature"]
    assert dict(failed.info.metadata) == {"field": "sampling.temperature", "value": "-1.0"}
    assert s.engine.requests == []
