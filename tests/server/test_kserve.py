"""KServe's protocol over a socket, but for its streams: generations, models, the repository, and how calls end."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace

import grpc
import pytest
from grpc_health.v1 import health_pb2
from support.call_lines import call_lines
from support.fake_engine import adapter_info, finished, token
from support.grpc_harness import Served, failure, served
from support.kserve import infer, kserve_served, said
from support.reflected import reflected

from gralora.foreign import kserve_pb2
from gralora_runtime.adapters.catalogue.store import AdapterState
from gralora_runtime.errors import AdapterBusyError, AdapterNotFoundError, AdapterRejectedError, QueueFullError
from gralora_runtime.request import FinishReason

Code = grpc.StatusCode
SERVICE = "inference.GRPCInferenceService"


# --- generations


async def test_a_generation_is_answered_at_once_after_its_prompt() -> None:
    async with kserve_served() as s:
        s.engine.script = [token(1), token(2), finished(FinishReason.STOP, output_tokens=2)]
        answer = await s.client.kserve.ModelInfer(infer(model="poet", id="7", sampling={"temperature": "0"}))
        (request,) = s.engine.requests

    assert said(answer) == {"text_output": "hellot1 t2 "}
    assert (answer.model_name, answer.model_version, answer.id) == ("poet", "2", "7")
    assert (request.prompt.text, request.adapter, request.sampling.temperature) == ("hello", "poet", 0.0)


async def test_the_base_model_answers_with_all_that_it_is_asked_for() -> None:
    outputs = ["text_output", "finish_reason", "num_input_tokens", "num_output_tokens"]
    async with kserve_served() as s:
        s.engine.script = [token(1), token(2), finished(FinishReason.STOP, output_tokens=2)]
        answer = await s.client.kserve.ModelInfer(infer(outputs=outputs, exclude_input_in_output=True))

    assert said(answer) == {
        "text_output": "t1 t2 ",
        "finish_reason": "stop",
        "num_input_tokens": 3,
        "num_output_tokens": 2,
    }
    assert (answer.model_version, answer.id) == ("1", "")


@pytest.mark.parametrize("reason", FinishReason)
async def test_every_end_has_a_reason_that_vllm_knows(reason: FinishReason) -> None:
    async with kserve_served() as s:
        s.engine.script = [finished(reason)]
        answer = await s.client.kserve.ModelInfer(infer(outputs=["finish_reason"]))

    assert said(answer)["finish_reason"] in ("stop", "length", "abort")
    assert (said(answer)["finish_reason"] == "abort") is not reason.is_whole


async def test_two_requests_may_have_one_id() -> None:
    """Their clients number requests from 0, each for itself."""
    async with kserve_served() as s:
        calls = [asyncio.ensure_future(s.client.kserve.ModelInfer(infer(text, id="0"))) for text in ("one", "two")]
        for request_id in [await s.engine.submitted.get() for _ in calls]:
            s.engine.streams[request_id].put(finished())
        answers = await asyncio.gather(*calls)

    assert [said(answer)["text_output"] for answer in answers] == ["one", "two"]
    assert {answer.id for answer in answers} == {"0"}


async def test_a_request_id_of_ours_is_ours() -> None:
    async with kserve_served() as s:
        s.engine.script = [finished()]
        await s.client.kserve.ModelInfer(infer(id="0", parameters={"request_id": "mine"}))

    assert [request.request_id for request in s.engine.requests] == ["mine"]


async def test_a_timeout_is_a_deadline_if_it_is_sooner() -> None:
    async with kserve_served() as s:
        s.engine.script = [finished()]
        await s.client.kserve.ModelInfer(infer(parameters={"timeout": 2_000_000}), timeout=100)
        await s.client.kserve.ModelInfer(infer(parameters={"timeout": 200_000_000}), timeout=10)
        sooner, later = (request.timeout_s for request in s.engine.requests)

    assert sooner == 2
    assert 1 < later < 20


async def test_pieces_are_for_streams() -> None:
    async with kserve_served() as s:
        failed = await failure(s.client.kserve.ModelInfer(infer(stream=True)))

    assert (failed.code, failed.fields) == (Code.INVALID_ARGUMENT, ["stream"])
    assert s.engine.requests == []


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (infer(""), "text_input"),
        (infer(sampling={"temperature": -1}), "temperature"),
        (infer(sampling={"top_p": "nan"}), "top_p"),
        (infer(sampling={"max_tokens": 0}), "max_tokens"),
        (infer(sampling={"stop": [""]}), "stop[0]"),
        (infer(model="x" * 600), "model_name"),
        (infer(sampling={"lora_name": "x" * 600}), "lora_name"),
        (infer(sampling={"early_exit": 1}), "early_exit"),
        (infer(image="a"), "inputs"),
    ],
    ids=["text", "range", "nan", "count", "list", "model", "lora", "unknown", "input"],
)
async def test_an_invalid_request_names_the_field_as_the_client_wrote_it(
    request_: kserve_pb2.ModelInferRequest, field: str
) -> None:
    async with kserve_served() as s:
        failed = await failure(s.client.kserve.ModelInfer(request_))

    assert (failed.code, failed.info.reason, failed.fields) == (Code.INVALID_ARGUMENT, "INVALID_REQUEST", [field])
    assert failed.message.startswith(f"{field}: ")


async def test_other_errors_are_those_of_our_own_protocol() -> None:
    async with kserve_served() as s:
        s.engine.refusals = [AdapterNotFoundError("nobody"), QueueFullError("too many wait", 1.5)]
        absent, full = [await failure(s.client.kserve.ModelInfer(infer(model="nobody"))) for _ in range(2)]

    assert (absent.code, absent.info.reason) == (Code.NOT_FOUND, "ADAPTER_NOT_FOUND")
    assert (full.code, full.info.reason) == (Code.RESOURCE_EXHAUSTED, "QUEUE_FULL")
    assert full.trailers["grpc-retry-pushback-ms"] == "1500"


async def test_a_client_that_leaves_ends_its_generation() -> None:
    async with kserve_served() as s:
        call = s.client.kserve.ModelInfer(infer())
        request_id = await s.engine.submitted.get()
        call.cancel()
        await asyncio.wait_for(s.engine.abort_happened.wait(), 10)

    assert s.engine.aborted == [request_id]


async def test_the_log_line_has_what_served_and_an_id(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="gralora_server.calls")
    async with kserve_served() as s:
        s.engine.script = [finished()]
        await s.client.kserve.ModelInfer(infer(model="poet", id="7"))
        await s.client.kserve.ModelInfer(infer())
        await s.client.kserve.ModelMetadata(kserve_pb2.ModelMetadataRequest(name="poet"))
        first, second = [request.request_id for request in s.engine.requests]

    lines = call_lines(caplog)
    assert lines[0]["client_id"] == "7"
    assert [(line["method"], line["adapter"], line["request_id"], line["code"]) for line in lines] == [
        (f"/{SERVICE}/ModelInfer", "poet@2", first, "OK"),
        (f"/{SERVICE}/ModelInfer", "", second, "OK"),
        (f"/{SERVICE}/ModelMetadata", "poet", "", "OK"),
    ]


# --- the server


async def test_without_the_switch_there_is_no_such_service() -> None:
    async with served() as s:
        failed = await failure(s.client.kserve.ServerLive(kserve_pb2.ServerLiveRequest()))
        health = await failure(s.client.health.Check(health_pb2.HealthCheckRequest(service=SERVICE)))
        names = await reflected(s)

    assert failed.code is Code.UNIMPLEMENTED
    assert health.code is Code.NOT_FOUND
    assert SERVICE not in names


async def test_with_it_health_and_reflection_know_the_service() -> None:
    async with kserve_served() as s:
        health = await s.client.health.Check(health_pb2.HealthCheckRequest(service=SERVICE))
        names = await reflected(s)

    assert health.status == health_pb2.HealthCheckResponse.SERVING
    assert {SERVICE, "gralora.v1.GenerationService"} <= names


async def readiness(s: Served) -> tuple[bool, bool, bool]:
    """Whether it lives, is ready, and its adapter is."""
    kserve = s.client.kserve
    live = await kserve.ServerLive(kserve_pb2.ServerLiveRequest())
    ready = await kserve.ServerReady(kserve_pb2.ServerReadyRequest())
    model = await kserve.ModelReady(kserve_pb2.ModelReadyRequest(name="poet"))
    return live.live, ready.ready, model.ready


async def test_a_server_is_ready_while_it_takes_requests() -> None:
    async with kserve_served() as s:
        at_first = await readiness(s)
        await s.server.set_stuck(True)
        stuck = await readiness(s)
        await s.server.set_stuck(False)
        again = await readiness(s)
        await s.server.drain(0)
        draining = await readiness(s)

    assert (at_first, stuck, again, draining) == (
        (True, True, True), (True, False, False), (True, True, True), (True, False, False)
    )  # fmt: skip


async def test_while_the_model_loads_it_lives_and_says_so() -> None:
    async with kserve_served(started=False) as s:
        state = await readiness(s)
        failures = [
            await failure(s.client.kserve.ModelInfer(infer())),
            await failure(s.client.kserve.ServerMetadata(kserve_pb2.ServerMetadataRequest())),
            await failure(s.client.kserve.RepositoryIndex(kserve_pb2.RepositoryIndexRequest())),
            await failure(s.client.kserve.ModelStreamInfer().read()),
        ]

    assert state == (True, False, False)
    assert {(failed.code, failed.info.reason) for failed in failures} == {(Code.UNAVAILABLE, "STARTING")}


async def test_it_tells_what_it_is() -> None:
    async with kserve_served() as s:
        answer = await s.client.kserve.ServerMetadata(kserve_pb2.ServerMetadataRequest())

    assert (answer.name, answer.version) == ("gralora", "0.1.0")
    assert "model_repository" in answer.extensions


# --- models


@pytest.mark.parametrize(
    ("name", "version", "ready"),
    [
        ("fake", "", True), ("fake", "1", True), ("poet", "", True), ("poet", "3", True), ("poet@3", "", True),
        ("poet@sha256:" + "3" * 12, "", True), ("poet", "9", False), ("nobody", "", False), ("broken", "", False),
        ("coming", "", False), ("cold", "", True),
    ],
)  # fmt: skip
async def test_a_model_is_ready_if_it_can_be_asked_for(name: str, version: str, ready: bool) -> None:
    async with kserve_served() as s:
        furnish(s)
        answer = await s.client.kserve.ModelReady(kserve_pb2.ModelReadyRequest(name=name, version=version))

    assert answer.ready is ready


def furnish(s: Served) -> None:
    """An adapter in each state that matters, beside the one that is there."""
    for name, state, error in (
        ("broken", AdapterState.FAILED, "it is no adapter"),
        ("coming", AdapterState.LOADING, ""),
        ("cold", AdapterState.REGISTERED, ""),
    ):
        s.engine.adapters.infos[name] = replace(adapter_info(name), state=state, error=error)


async def test_a_models_metadata_say_what_it_takes_and_gives() -> None:
    async with kserve_served() as s:
        base = await s.client.kserve.ModelMetadata(kserve_pb2.ModelMetadataRequest(name="fake"))
        poet = await s.client.kserve.ModelMetadata(kserve_pb2.ModelMetadataRequest(name="poet", version="3"))

    assert (base.name, list(base.versions), base.platform) == ("fake", ["1"], "gralora")
    assert (poet.name, list(poet.versions)) == ("poet", ["1", "2", "3"])
    assert (base.inputs, base.outputs) == (poet.inputs, poet.outputs)
    assert [(tensor.name, tensor.datatype, list(tensor.shape)) for tensor in base.inputs][:3] == [
        ("text_input", "BYTES", [1]),
        ("sampling_parameters", "BYTES", [1]),
        ("stream", "BOOL", [1]),
    ]
    assert [tensor.name for tensor in base.outputs] == [
        "text_output", "finish_reason", "num_input_tokens", "num_output_tokens"
    ]  # fmt: skip


async def test_a_models_configuration_says_that_its_answers_come_in_pieces() -> None:
    async with kserve_served() as s:
        config = (await s.client.kserve.ModelConfig(kserve_pb2.ModelConfigRequest(name="poet"))).config

    assert (config.name, config.backend, config.max_batch_size) == ("poet", "gralora", 0)
    assert config.model_transaction_policy.decoupled
    assert [tensor.name for tensor in config.input if not tensor.optional] == ["text_input"]
    assert config.output[0].data_type == kserve_pb2.TYPE_STRING


@pytest.mark.parametrize("method", ["ModelMetadata", "ModelConfig"])
async def test_of_a_model_that_there_is_not_nothing_is_told(method: str) -> None:
    request = getattr(kserve_pb2, f"{method}Request")
    async with kserve_served() as s:
        call = getattr(s.client.kserve, method)
        absent = await failure(call(request(name="nobody")))
        no_version = await failure(call(request(name="poet", version="9")))
        of_base = await failure(call(request(name="fake", version="2")))
        nameless = await failure(call(request()))

    assert (absent.code, absent.info.reason) == (Code.NOT_FOUND, "ADAPTER_NOT_FOUND")
    assert (no_version.code, no_version.info.reason) == (Code.NOT_FOUND, "ADAPTER_VERSION_NOT_FOUND")
    assert (of_base.code, of_base.fields) == (Code.INVALID_ARGUMENT, ["version"])
    assert (nameless.code, nameless.fields) == (Code.INVALID_ARGUMENT, ["name"])


# --- the repository


async def test_the_index_has_every_model_with_its_state() -> None:
    async with kserve_served() as s:
        furnish(s)
        answer = await s.client.kserve.RepositoryIndex(kserve_pb2.RepositoryIndexRequest())
        ready = await s.client.kserve.RepositoryIndex(kserve_pb2.RepositoryIndexRequest(ready=True))

    assert [(model.name, model.version, model.state, model.reason) for model in answer.models] == [
        ("fake", "1", "READY", ""),
        ("broken", "2", "UNAVAILABLE", "it is no adapter"),
        ("cold", "2", "READY", ""),
        ("coming", "2", "LOADING", ""),
        ("poet", "2", "READY", ""),
    ]
    assert [model.name for model in ready.models] == ["fake", "cold", "poet"]


async def test_the_index_goes_through_all_pages() -> None:
    names = [f"a{number:04}" for number in range(2500)]
    async with kserve_served() as s:
        s.engine.adapters.infos = {name: adapter_info(name) for name in names}
        answer = await s.client.kserve.RepositoryIndex(kserve_pb2.RepositoryIndexRequest())

    assert [model.name for model in answer.models] == ["fake", *names]


async def test_adapters_are_loaded_and_unloaded() -> None:
    unload = kserve_pb2.RepositoryModelUnloadRequest(model_name="poet")
    unload.parameters["unload_dependents"].bool_param = False  # as tritonclient always says
    async with kserve_served() as s:
        await s.client.kserve.RepositoryModelLoad(kserve_pb2.RepositoryModelLoadRequest(model_name="bard"))
        await s.client.kserve.RepositoryModelUnload(unload)

    assert s.engine.adapters.calls == [("load", "bard", None, False), ("unload", "poet")]


async def test_the_base_model_is_there_and_stays() -> None:
    async with kserve_served() as s:
        await s.client.kserve.RepositoryModelLoad(kserve_pb2.RepositoryModelLoadRequest(model_name="fake"))
        unload = kserve_pb2.RepositoryModelUnloadRequest(model_name="fake")
        failed = await failure(s.client.kserve.RepositoryModelUnload(unload))

    assert (failed.code, failed.fields) == (Code.INVALID_ARGUMENT, ["model_name"])
    assert s.engine.adapters.calls == []


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (AdapterNotFoundError("bard"), Code.NOT_FOUND),
        (AdapterRejectedError("bard", ["it is broken"]), Code.FAILED_PRECONDITION),
        (AdapterBusyError("bard", 2), Code.FAILED_PRECONDITION),
    ],
)
async def test_what_cannot_be_changed_ends_as_with_our_own_methods(error: Exception, code: Code) -> None:
    async with kserve_served() as s:
        s.engine.adapters.error = error
        load = kserve_pb2.RepositoryModelLoadRequest(model_name="bard")
        failures = [
            await failure(s.client.kserve.RepositoryModelLoad(load)),
            await failure(
                s.client.kserve.RepositoryModelUnload(kserve_pb2.RepositoryModelUnloadRequest(model_name="bard"))
            ),
        ]

    assert {failed.code for failed in failures} == {code}
    assert {failed.info.reason for failed in failures} == {error.reason}


async def test_what_the_repository_does_not_have_is_refused_by_name() -> None:
    configured = kserve_pb2.RepositoryModelLoadRequest(model_name="bard")
    configured.parameters["config"].string_param = "{}"
    async with kserve_served() as s:
        kserve = s.client.kserve
        failures = [
            await failure(kserve.RepositoryIndex(kserve_pb2.RepositoryIndexRequest(repository_name="r"))),
            await failure(kserve.RepositoryModelLoad(configured)),
            await failure(kserve.RepositoryModelLoad(kserve_pb2.RepositoryModelLoadRequest(model_name="a b"))),
            await failure(kserve.RepositoryModelUnload(kserve_pb2.RepositoryModelUnloadRequest())),
        ]

    assert {failed.code for failed in failures} == {Code.INVALID_ARGUMENT}
    assert [failed.fields for failed in failures] == [
        ["repository_name"],
        ["parameters"],
        ["model_name"],
        ["model_name"],
    ]
    assert s.engine.adapters.calls == []
