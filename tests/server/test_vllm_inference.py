"""Generations of vLLM's protocol over a socket: answers, refusals as Dynamo can bear them, and how calls end."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field

import grpc
import pytest
from grpc_health.v1 import health_pb2
from support.call_lines import call_lines
from support.fake_engine import finished, token
from support.grpc_harness import Served, failure, read_all, served
from support.reflected import reflected
from support.tenants import as_, furnish, two_tenants
from support.vllm_grpc import Request, as_dynamo, generate, text_of, tokens_of, vllm_served

from gralora.foreign import vllm_pb2
from gralora_runtime.errors import (
    AdapterNotFoundError,
    GraloraError,
    NumericalError,
    QueueFullError,
    QuotaExceededError,
    StepFailedError,
    TooLateError,
)
from gralora_runtime.request import FinishReason, GenerationRequest
from gralora_runtime.stream import RequestStream
from gralora_server.vllm_grpc.inference import VllmInference

Code = grpc.StatusCode
SERVICES = ("vllm.Inference", "vllm.Control")
UNARY, STREAM = "/vllm.Inference/Generate", "/vllm.Inference/GenerateStream"


async def streamed(s: Served, request: Request, **call: object) -> list[vllm_pb2.GenerateResponse]:
    return await read_all(s.client.inference.GenerateStream(request, **call))


@dataclass(slots=True)
class Heard:
    """A call's context that remembers what went out, and in which order."""

    sent: list[str] = field(default_factory=list)

    def time_remaining(self) -> None:
        return None

    async def send_initial_metadata(self, metadata: tuple[()]) -> None:
        self.sent.append("headers")

    async def write(self, message: vllm_pb2.GenerateResponse) -> None:
        self.sent.append("message")


async def refused(s: Served, request: Request) -> tuple[GraloraError, list[str]]:
    """How a stream ends, and what went out before: a client cannot tell headers that have nothing in them from none."""
    context = Heard()
    inference = VllmInference(s.server.gate, s.server.generating, write_timeout_s=10)
    with pytest.raises(GraloraError) as caught:
        await inference.GenerateStream(request, context)
    return caught.value, context.sent


# --- answers


async def test_a_stream_tells_the_prompt_tokens_and_the_end() -> None:
    async with vllm_served() as s:
        s.engine.script = [token(1), token(2), finished(FinishReason.STOP, output_tokens=2)]
        messages = await streamed(s, as_dynamo(lora_name="poet"))
        (request,) = s.engine.requests

    assert (request.adapter, request.prompt.token_ids, request.stopping.max_tokens) == ("poet", (5, 6, 7), 8)
    assert messages[0].prompt_info.num_prompt_tokens == 3
    assert not any(message.HasField("prompt_info") for message in messages[1:])
    assert (text_of(messages), tokens_of(messages)) == ("t1 t2 ", [1, 2])
    assert [message.outputs.HasField("finish_info") for message in messages[:-1]] == [False] * (len(messages) - 1)
    assert messages[-1].outputs.finish_info.num_output_tokens == sum(m.outputs.num_tokens for m in messages)


async def test_tokens_come_as_they_are_made() -> None:
    async with vllm_served() as s:
        call = s.client.inference.GenerateStream(as_dynamo())
        started = await call.read()
        s.engine.streams["r1"].put(token(1))
        first = await call.read()
        s.engine.streams["r1"].put(finished(output_tokens=1))
        last = await call.read()

    assert started.HasField("prompt_info")
    assert (first.outputs.text, list(first.outputs.token_ids)) == ("t1 ", [1])
    assert last.outputs.finish_info.finish_reason == vllm_pb2.FinishInfo.LENGTH


async def test_a_whole_answer_comes_at_once() -> None:
    async with vllm_served() as s:
        s.engine.script = [token(1), token(2), finished(output_tokens=2)]
        answer = await s.client.inference.Generate(generate(lora_name="poet", response={"output_token_ids": True}))

    assert answer.prompt_info.num_prompt_tokens == 3
    assert (answer.outputs.text, list(answer.outputs.token_ids)) == ("t1 t2 ", [1, 2])
    assert answer.outputs.finish_info.num_output_tokens == 2


async def test_the_prompts_tokens_are_told_to_who_asks() -> None:
    async with vllm_served() as s:
        s.engine.script = [finished()]
        answer = await s.client.inference.Generate(generate(response={"prompt_token_ids": True}))

    assert list(answer.prompt_info.token_ids) == [7, 8, 9]


async def test_a_deadline_is_the_calls() -> None:
    async with vllm_served() as s:
        s.engine.script = [finished()]
        await streamed(s, generate(), timeout=10)
        await streamed(s, generate())
        with_one, without = (request.timeout_s for request in s.engine.requests)

    assert with_one is not None
    assert 1 < with_one < 20  # gRPC rounds up
    assert without is None


# --- refusals

REFUSALS = [
    AdapterNotFoundError("nobody"),
    QueueFullError("too many wait", 1.5),
    QuotaExceededError("acme", "streams", 1, "one more", 1.0),
    TooLateError("r1", what="first token", expected_s=9.0, limit_s=1.0, retry_after_s=2.0),
    StepFailedError("e1"),
]


@pytest.mark.parametrize("error", REFUSALS, ids=lambda error: error.reason)
async def test_who_is_refused_has_had_its_headers(error: GraloraError) -> None:
    """Dynamo takes a worker out of rotation whose stream ends without any: a full queue would end all service."""
    async with vllm_served() as s:
        s.engine.refusals = [error]
        found, sent = await refused(s, as_dynamo())
        s.engine.refusals = [error]
        over_a_socket = await failure(streamed(s, as_dynamo()))

    assert (found, sent) == (error, ["headers"])
    assert over_a_socket.info.reason == error.reason


async def test_who_asks_for_what_cannot_be_has_had_its_headers_too() -> None:
    async with vllm_served() as s:
        error, sent = await refused(s, generate(kv={"cache_salt": "s"}))

    assert (error.reason, sent) == ("INVALID_REQUEST", ["headers"])
    assert s.engine.requests == []


async def test_headers_come_while_a_request_waits_to_be_taken() -> None:
    taken = asyncio.Event()
    async with vllm_served() as s:

        async def submit(_request: GenerationRequest) -> RequestStream:
            await taken.wait()
            raise QueueFullError("too many wait", 1.5)

        s.engine.submit = submit
        call = s.client.inference.GenerateStream(as_dynamo())
        await asyncio.wait_for(call.initial_metadata(), 10)
        taken.set()
        failed = await failure(read_all(call))

    assert (failed.code, failed.info.reason) == (Code.RESOURCE_EXHAUSTED, "QUEUE_FULL")


async def test_a_server_that_takes_nothing_says_so_without_headers() -> None:
    """Then Dynamo is right to ask another worker."""
    async with vllm_served(started=False) as s:
        starting = await refused(s, as_dynamo())
        code = (await failure(streamed(s, as_dynamo()))).code
    async with vllm_served() as s:
        await s.server.drain(0)
        draining = await refused(s, as_dynamo())

    assert (starting[0].reason, starting[1]) == ("STARTING", [])
    assert (draining[0].reason, draining[1]) == ("DRAINING", [])
    assert code is Code.UNAVAILABLE


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (generate(""), "text"),
        (generate(temperature=-1.0), "temperature"),
        (generate(stopping={"min_new_tokens": 30}), "stopping.min_new_tokens"),
        (generate(model="poet"), "model"),
        (generate(lora_name="x" * 600), "lora_name"),
        (generate(decoding={"structural_tag": "<a>"}), "decoding.structural_tag"),
    ],
    ids=["text", "range", "count", "model", "lora", "not-served"],
)
async def test_an_invalid_request_names_the_field_as_the_client_wrote_it(request_: Request, field: str) -> None:
    async with vllm_served() as s:
        once = await failure(s.client.inference.Generate(request_))
        stream = await failure(streamed(s, request_))

    for failed in (once, stream):
        assert (failed.code, failed.info.reason, failed.fields) == (Code.INVALID_ARGUMENT, "INVALID_REQUEST", [field])


async def test_an_error_in_the_middle_is_the_streams_status() -> None:
    async with vllm_served() as s:
        call = s.client.inference.GenerateStream(as_dynamo())
        await call.read()
        s.engine.streams["r1"].put(token(1))
        await call.read()
        s.engine.streams["r1"].fail(NumericalError("r1", "poet", "gave NaN"))
        failed = await failure(read_all(call))

    assert (failed.code, failed.info.reason) == (Code.FAILED_PRECONDITION, "NON_FINITE_LOGITS")


# --- leaving


async def test_a_client_that_leaves_ends_its_generation() -> None:
    async with vllm_served() as s:
        call = s.client.inference.GenerateStream(as_dynamo())
        await call.read()
        call.cancel()
        await asyncio.wait_for(s.engine.abort_happened.wait(), 10)

    assert s.engine.aborted == ["r1"]


async def test_a_client_that_leaves_after_the_last_message_aborts_nothing() -> None:
    """As Dynamo does: it does not wait for the status."""
    async with vllm_served() as s:
        s.engine.script = [token(1), finished(output_tokens=1)]
        call = s.client.inference.GenerateStream(as_dynamo())
        while not (message := await call.read()).outputs.HasField("finish_info"):
            pass
        call.cancel()
        await s.server.drain(10)

    assert message.outputs.finish_info.num_output_tokens == 1
    assert s.engine.aborted == []


async def test_an_abort_by_id_ends_the_callers_requests_alone() -> None:
    abort = vllm_pb2.AbortRequest(request_ids=["r1", "r2", "nobody"])
    async with vllm_served(tenancy=two_tenants()) as s:
        furnish(s)
        calls = [
            s.client.inference.GenerateStream(as_dynamo(request_id), metadata=as_(tenant))
            for request_id, tenant in (("r1", "acme"), ("r1", "bob"), ("r2", "acme"))
        ]
        for call in calls:
            await call.read()
        await s.client.control.Abort(abort, metadata=as_("acme"))
        aborted = list(s.engine.aborted)

    assert aborted == ["acme r1", "acme r2"]


@pytest.mark.parametrize("ids", [[""], ["two words"], ["x"] * 1025], ids=["empty", "words", "many"])
async def test_an_abort_names_requests_and_not_too_many(ids: list[str]) -> None:
    async with vllm_served() as s:
        failed = await failure(s.client.control.Abort(vllm_pb2.AbortRequest(request_ids=ids)))

    assert (failed.code, failed.fields) == (Code.INVALID_ARGUMENT, ["request_ids"])


# --- the log


async def test_the_log_line_has_what_served_and_an_id(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="gralora_server.calls")
    async with vllm_served() as s:
        s.engine.script = [finished()]
        await streamed(s, as_dynamo(lora_name="poet"))
        await s.client.inference.Generate(generate())
        await s.client.control.UnloadLora(vllm_pb2.UnloadLoraRequest(lora_name="poet"))
        made = s.engine.requests[1].request_id

    assert [(line["method"], line["adapter"], line["request_id"], line["code"]) for line in call_lines(caplog)] == [
        (STREAM, "poet@2", "r1", "OK"),
        (UNARY, "", made, "OK"),
        ("/vllm.Control/UnloadLora", "poet", "", "OK"),
    ]


# --- the switch


async def test_without_the_switch_there_are_no_such_services() -> None:
    async with served() as s:
        failed = [
            await failure(s.client.inference.Generate(generate())),
            await failure(s.client.control.ListLoras(vllm_pb2.ListLorasRequest())),
        ]
        health = [await failure(s.client.health.Check(health_pb2.HealthCheckRequest(service=one))) for one in SERVICES]
        names = await reflected(s)

    assert {one.code for one in failed} == {Code.UNIMPLEMENTED}
    assert {one.code for one in health} == {Code.NOT_FOUND}
    assert names.isdisjoint(SERVICES)


async def test_with_it_health_and_reflection_know_the_services() -> None:
    async with vllm_served() as s:
        health = [await s.client.health.Check(health_pb2.HealthCheckRequest(service=one)) for one in SERVICES]
        names = await reflected(s)

    assert {one.status for one in health} == {health_pb2.HealthCheckResponse.SERVING}
    assert names >= {*SERVICES, "gralora.v1.GenerationService"}
