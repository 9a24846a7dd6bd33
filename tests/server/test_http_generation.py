"""Completions over HTTP on a real socket: what goes in, what comes out, and how calls end."""

from __future__ import annotations

import asyncio
import json
import socket

import pytest
from support.fake_engine import finished, token
from support.http_harness import CHAT, TEXT, error_of, events, http_served, text_of

from gralora_runtime.errors import (
    AdapterNotFoundError,
    DeadlineExceededError,
    InvalidRequestError,
    NumericalError,
    QueueFullError,
)
from gralora_runtime.request import ChatMessage, Delta, FinishReason, StructuredOutput, TokenLogprob, WeightedAdapter


async def test_a_chat_is_answered_at_once() -> None:
    async with http_served() as s:
        s.engine.script = [token(1), token(2), finished(FinishReason.STOP, output_tokens=2, stop_string="x")]
        response = await s.client.post("/v1/chat/completions", json=CHAT, headers={"X-Request-Id": "r1"})

    assert response.status_code == 200
    assert response.headers["x-request-id"] == "r1"
    answer = response.json()
    assert answer | {"created": 0} == {
        "id": "chatcmpl-r1",
        "object": "chat.completion",
        "created": 0,
        "model": "fake",
        "choices": [
            {
                "index": 0,
                "finish_reason": "stop",
                "stop_reason": "x",
                "message": {"role": "assistant", "content": "t1 t2 "},
                "logprobs": None,
            }
        ],
        "usage": {
            "prompt_tokens": 3,
            "completion_tokens": 2,
            "total_tokens": 5,
            "prompt_tokens_details": {"cached_tokens": 1},
        },
    }
    (request,) = s.engine.requests
    assert request.prompt.messages == (ChatMessage("user", "hello"),)
    assert request.stopping.max_tokens is None


async def test_a_chat_comes_in_events_if_it_is_asked_to() -> None:
    body = CHAT | {"stream": True, "stream_options": {"include_usage": True}}
    async with http_served() as s:
        s.engine.script = [token(1), token(2), finished(output_tokens=2)]
        async with s.client.stream("POST", "/v1/chat/completions", json=body) as response:
            pieces = await events(response)

    assert response.headers["content-type"].startswith("text/event-stream")
    assert pieces.pop() == "[DONE]"
    usage = pieces.pop()
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 2
    assert pieces[0]["choices"][0]["delta"]["role"] == "assistant"
    assert all(piece["object"] == "chat.completion.chunk" for piece in pieces)
    assert len({piece["id"] for piece in pieces}) == 1
    assert text_of(pieces) == "t1 t2 "
    assert [piece["choices"][0]["finish_reason"] for piece in pieces][-1] == "length"
    assert all("usage" not in piece for piece in pieces)


async def test_each_event_has_the_usage_so_far_if_that_is_asked_for() -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    async with http_served() as s:
        s.engine.script = [token(1), token(2), finished(output_tokens=2)]
        body = TEXT | {"stream": True, "stream_options": options}
        async with s.client.stream("POST", "/v1/completions", json=body) as response:
            pieces = (await events(response))[:-1]

    usages = [piece["usage"] for piece in pieces]
    assert all(usage["prompt_tokens"] == 3 for usage in usages)
    assert usages[0]["completion_tokens"] <= usages[1]["completion_tokens"] <= 2
    assert usages[-2] == usages[-1]
    assert usages[-1]["total_tokens"] == 5


async def test_what_is_so_in_any_case_may_be_said() -> None:
    """Clients that were written for vLLM say its defaults."""
    said = {"skip_special_tokens": True, "use_beam_search": False, "length_penalty": 1.0, "early_stopping": None}
    async with http_served() as s:
        s.engine.script = [finished()]
        taken = await s.client.post("/v1/completions", json=TEXT | said)
        refused = await s.client.post("/v1/completions", json=TEXT | said | {"skip_special_tokens": False})

    assert taken.status_code == 200
    assert (refused.status_code, error_of(refused)["param"]) == (400, "skip_special_tokens")


async def test_events_come_as_tokens_do() -> None:
    async with http_served() as s, s.client.stream("POST", "/v1/completions", json=TEXT | {"stream": True}) as response:
        lines = response.aiter_lines()
        request_id = await s.engine.submitted.get()
        s.engine.streams[request_id].put(token(7))
        seen = ""
        while "t7" not in seen:
            seen = await anext(lines)
        s.engine.streams[request_id].put(finished(output_tokens=1))
        rest = [line async for line in lines if line]

    assert rest[-1] == "data: [DONE]"


async def test_every_parameter_arrives_where_grpc_has_it() -> None:
    body = TEXT | {
        "model": "poet@2",
        "temperature": 0.5,
        "top_p": 0.25,
        "top_k": 7,
        "min_p": 0.125,
        "repetition_penalty": 1.5,
        "presence_penalty": -1,
        "frequency_penalty": 0.75,
        "seed": 2**64 - 1,
        "logit_bias": {"5": -100},
        "max_tokens": 9,
        "min_tokens": 2,
        "stop": ["a", "b"],
        "stop_token_ids": [3],
        "ignore_eos": True,
        "priority": 4,
        "user": "u1",
        "logprobs": 2,
    }
    async with http_served() as s:
        s.engine.script = [finished()]
        assert (await s.client.post("/v1/completions", json=body)).status_code == 200
        (request,) = s.engine.requests

    assert request.adapter == "poet@2"
    assert request.canary_key == "u1"
    assert request.priority == 4
    sampling, stopping = request.sampling, request.stopping
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.25, 7, 0.125)
    assert (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) == (1.5, -1, 0.75)
    assert (sampling.seed, dict(sampling.logit_bias)) == (2**64 - 1, {5: -100})
    assert (stopping.max_tokens, stopping.min_tokens, stopping.stop) == (9, 2, ("a", "b"))
    assert (stopping.stop_token_ids, stopping.ignore_eos) == ((3,), True)
    assert (request.response.logprobs, request.response.top_logprobs) == (True, 2)


async def test_several_adapters_are_asked_for_beside_the_base_model_s_name() -> None:
    async with http_served() as s:
        s.engine.script = [finished()]
        adapters = [{"name": "poet", "weight": 0.5}, {"name": "pirate@3"}, {"name": "bard", "weight": None}]
        answer = await s.client.post("/v1/completions", json=TEXT | {"adapters": adapters})

    assert answer.json()["model"] == "poet@2*0.5+pirate@3@2+bard@2"
    (request,) = s.engine.requests
    assert request.adapter == ""
    expected = (WeightedAdapter("poet", 0.5), WeightedAdapter("pirate@3"), WeightedAdapter("bard"))
    assert request.adapters == expected


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"model": "poet", "adapters": [{"name": "pirate"}]}, "model"),
        ({"adapters": [{"name": "pirate"}] * 5}, "adapters"),
        ({"adapters": [{"name": "pirate"}, {"name": "poet", "weight": 0}]}, "adapters[1].weight"),
        ({"adapters": [{"name": "pirate", "weight": 1e300}]}, "adapters[0].weight"),
        ({"adapters": [{"name": "pirate", "weight": "1"}]}, "adapters[0].weight"),
        ({"adapters": [{"name": "pirate"}, {"name": "poet", "scale": 0.5}]}, "adapters[1].scale"),
        ({"adapters": [{"name": ""}]}, "adapters[0].name"),
        ({"adapters": [{"weight": 1.0}]}, "adapters[0].name"),
    ],
)
async def test_what_is_wrong_with_adapters_is_named_as_the_body_has_it(changes: dict[str, object], param: str) -> None:
    async with http_served() as s:
        error = error_of(await s.client.post("/v1/chat/completions", json=CHAT | changes))

    assert (error["param"], error["code"]) == (param, "INVALID_REQUEST")
    assert s.engine.requests == []


async def test_a_model_s_name_is_the_base_s_or_an_adapter_s_and_the_answer_says_which_version_served() -> None:
    async with http_served() as s:
        s.engine.script = [finished()]
        base = await s.client.post("/v1/completions", json=TEXT)
        poet = await s.client.post("/v1/completions", json=TEXT | {"model": "poet"})

    assert [request.adapter for request in s.engine.requests] == ["", "poet"]
    assert (base.json()["model"], poet.json()["model"]) == ("fake", "poet@2")


async def test_several_choices_of_several_prompts_have_seeds_and_ids_of_their_own() -> None:
    body = TEXT | {"prompt": ["one", "two"], "n": 2, "seed": 10}
    async with http_served() as s:
        s.engine.script = [token(1), finished(output_tokens=1)]
        response = await s.client.post("/v1/completions", json=body, headers={"X-Request-Id": "r"})

    asked = [(one.request_id, one.prompt.text, one.sampling.seed) for one in s.engine.requests]
    assert asked == [("r-0", "one", 10), ("r-1", "one", 11), ("r-2", "two", 10), ("r-3", "two", 11)]
    answer = response.json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert answer["usage"]["prompt_tokens"] == 6  # each prompt once
    assert answer["usage"]["completion_tokens"] == 4


async def test_several_choices_in_events_do_not_mix() -> None:
    body = CHAT | {"n": 3, "stream": True}
    async with http_served() as s, s.client.stream("POST", "/v1/chat/completions", json=body) as response:
        ids = [await s.engine.submitted.get() for _ in range(3)]
        for number in range(4):
            for index, request_id in enumerate(ids):
                s.engine.streams[request_id].put(token(10 * index + number))
        for request_id in ids:
            s.engine.streams[request_id].put(finished(output_tokens=4))
        pieces = await events(response)

    assert [text_of(pieces, index) for index in range(3)] == [
        "".join(f"t{10 * index + number} " for number in range(4)) for index in range(3)
    ]


async def test_token_ids_are_a_prompt_too_and_can_be_had_back() -> None:
    async with http_served() as s:
        s.engine.script = [token(1), finished(output_tokens=1)]
        response = await s.client.post("/v1/completions", json=TEXT | {"prompt": [5, 6], "return_token_ids": True})

    assert s.engine.requests[0].prompt.token_ids == (5, 6)
    (choice,) = response.json()["choices"]
    assert choice["token_ids"] == [1]
    assert choice["prompt_token_ids"] == [7, 8, 9]


async def test_log_probabilities_of_a_chat() -> None:
    probable = TokenLogprob(1, -0.5, ((1, -0.5), (2, float("-inf"))))
    async with http_served() as s:
        s.engine.script = [Delta(text="t1 ", token_ids=(1,), logprobs=(probable,)), finished(output_tokens=1)]
        body = CHAT | {"logprobs": True, "top_logprobs": 2}
        response = await s.client.post("/v1/chat/completions", json=body)

    (first,) = response.json()["choices"][0]["logprobs"]["content"]
    assert (first["token"], first["logprob"], first["bytes"]) == ("t1 ", -0.5, list(b"t1 "))
    assert [top["logprob"] for top in first["top_logprobs"]] == [-0.5, -9999.0]


async def test_log_probabilities_of_a_text_say_where_tokens_begin() -> None:
    def probable(number: int) -> Delta:
        logprobs = (TokenLogprob(number, -0.5, ((number, -0.5),)),)
        return Delta(text=f"t{number} ", token_ids=(number,), logprobs=logprobs)

    async with http_served() as s:
        s.engine.script = [probable(1), probable(22), finished(output_tokens=2)]
        whole = await s.client.post("/v1/completions", json=TEXT | {"logprobs": 1})
        async with s.client.stream("POST", "/v1/completions", json=TEXT | {"logprobs": 1, "stream": True}) as response:
            pieces = (await events(response))[:-1]

    logprobs = whole.json()["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["t1 ", "t22 "]
    assert logprobs["text_offset"] == [0, 3]
    assert logprobs["top_logprobs"] == [{"t1 ": -0.5}, {"t22 ": -0.5}]
    told = [piece["choices"][0]["logprobs"] for piece in pieces if piece["choices"][0]["logprobs"]]
    assert [offset for one in told for offset in one["text_offset"]] == [0, 3]


@pytest.mark.parametrize("reason", [FinishReason.DEADLINE, FinishReason.CANCELLED])
async def test_an_answer_that_was_cut_short_says_so(reason: FinishReason) -> None:
    async with http_served() as s:
        s.engine.script = [token(1), finished(reason, output_tokens=1)]
        (choice,) = (await s.client.post("/v1/completions", json=TEXT)).json()["choices"]

    assert (choice["finish_reason"], choice["stop_reason"]) == ("length", reason.value)


async def test_parts_of_a_message_are_joined_and_other_kinds_are_refused() -> None:
    def turn(*parts: dict[str, object]) -> dict[str, object]:
        return CHAT | {"messages": [{"role": "user", "content": parts}]}

    text = {"type": "text", "text": "a"}
    async with http_served() as s:
        s.engine.script = [finished()]
        joined = await s.client.post("/v1/chat/completions", json=turn(text, text))
        refused = await s.client.post("/v1/chat/completions", json=turn(text, {"type": "image_url", "image_url": {}}))

    assert joined.status_code == 200
    assert s.engine.requests[0].prompt.messages == (ChatMessage("user", "aa"),)
    assert error_of(refused)["param"].startswith("messages[0].content[1]")


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, StructuredOutput(json_object=True)),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
            StructuredOutput(json_schema=json.dumps(SCHEMA)),
        ),
        ({"structured_outputs": {"json": SCHEMA}}, StructuredOutput(json_schema=json.dumps(SCHEMA))),
        ({"structured_outputs": {"json": "{}"}}, StructuredOutput(json_schema="{}")),
        ({"structured_outputs": {"regex": "a+"}}, StructuredOutput(regex="a+")),
        ({"structured_outputs": {"choice": ["a", "b"]}}, StructuredOutput(choice=("a", "b"))),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, StructuredOutput(grammar='start: "a"')),
        ({"structured_outputs": {"json_object": True}}, StructuredOutput(json_object=True)),
    ],
)
async def test_what_an_answer_has_to_match(fields: dict[str, object], expected: StructuredOutput | None) -> None:
    async with http_served() as s:
        s.engine.script = [finished()]
        text = await s.client.post("/v1/completions", json=TEXT | fields)
        chat = await s.client.post("/v1/chat/completions", json=CHAT | fields)

    assert (text.status_code, chat.status_code) == (200, 200)
    assert [request.structured_output for request in s.engine.requests] == [expected, expected]


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, "structured_outputs"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"structured_outputs": {"regex": ""}}, "structured_outputs.regex"),
        ({"structured_outputs": {"regex": "a", "whitespace_pattern": " "}}, "structured_outputs.whitespace_pattern"),
        ({"structured_outputs": {"regex": "a", "flavour": 1}}, "structured_outputs.flavour"),
    ],
)
async def test_what_no_answer_can_match_is_refused(fields: dict[str, object], field: str) -> None:
    async with http_served() as s:
        response = await s.client.post("/v1/completions", json=TEXT | fields)

    assert (response.status_code, error_of(response)["code"]) == (400, "INVALID_REQUEST")
    assert error_of(response)["param"].startswith(field)


async def test_a_deadline_is_the_request_s() -> None:
    async with http_served() as s:
        s.engine.script = [finished()]
        headers = {"X-Request-Timeout": "2.5"}
        assert (await s.client.post("/v1/completions", json=TEXT, headers=headers)).status_code == 200
        wrong = await s.client.post("/v1/completions", json=TEXT, headers={"X-Request-Timeout": "soon"})

    assert s.engine.requests[0].timeout_s == pytest.approx(2.5, abs=1)
    assert error_of(wrong)["param"] == "X-Request-Timeout"


async def test_the_same_id_and_body_again_get_the_same_answer() -> None:
    async with http_served() as s:
        s.engine.script = [token(1), finished(output_tokens=1)]
        answers = [
            (await s.client.post("/v1/completions", json=TEXT, headers={"X-Request-Id": "r1"})).json() for _ in range(2)
        ]

    assert len(s.engine.requests) == 1
    assert answers[0]["choices"] == answers[1]["choices"]


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (InvalidRequestError("sampling.top_k", 1, "no"), 400, "invalid_request_error"),
        (AdapterNotFoundError("poet"), 404, "not_found_error"),
        (QueueFullError("7 requests wait", 1.5), 429, "rate_limit_error"),
        (DeadlineExceededError("r1"), 504, "timeout_error"),
        (ValueError("secret"), 500, "server_error"),
    ],
)
async def test_an_error_is_told_as_openai_s_with_the_reason_that_grpc_tells(
    error: Exception, status: int, kind: str
) -> None:
    async with http_served() as s:
        s.engine.refusals = [error]
        response = await s.client.post("/v1/completions", json=TEXT | {"model": "poet"})

    told = error_of(response)
    assert (response.status_code, told["type"]) == (status, kind)
    assert told["code"] == getattr(error, "reason", "INTERNAL")
    assert "secret" not in response.text


async def test_when_to_come_again_is_in_the_headers_that_clients_obey() -> None:
    async with http_served() as s:
        s.engine.refusals = [refusal := QueueFullError("7 requests wait", 1.5)]
        response = await s.client.post("/v1/completions", json=TEXT)

    assert refusal.retry_after_s is not None
    assert float(response.headers["retry-after-ms"]) == pytest.approx(1000 * refusal.retry_after_s, abs=1)
    assert int(response.headers["retry-after"]) >= refusal.retry_after_s


async def test_an_error_after_the_first_event_is_an_event() -> None:
    async with http_served() as s, s.client.stream("POST", "/v1/completions", json=TEXT | {"stream": True}) as response:
        request_id = await s.engine.submitted.get()
        s.engine.streams[request_id].put(token(1))
        s.engine.streams[request_id].fail(NumericalError(request_id, "poet", "NaN"))
        pieces = await events(response)

    assert pieces[-1] == "[DONE]"
    assert pieces[-2]["error"]["code"] == "NON_FINITE_LOGITS"


async def test_one_choice_that_fails_ends_all_of_them() -> None:
    body = TEXT | {"n": 2, "stream": True}
    async with http_served() as s, s.client.stream("POST", "/v1/completions", json=body) as response:
        first, second = [await s.engine.submitted.get() for _ in range(2)]
        s.engine.streams[first].put(token(1))
        s.engine.streams[second].fail(NumericalError(second, "poet", "NaN"))
        pieces = await events(response)
        await asyncio.wait_for(s.engine.abort_happened.wait(), 5)

    assert pieces[-2]["error"]["code"] == "NON_FINITE_LOGITS"
    assert first in s.engine.aborted


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_frees_its_request(stream: bool) -> None:
    async with http_served() as s:
        calling = asyncio.create_task(s.client.post("/v1/completions", json=TEXT | {"stream": stream}))
        request_id = await s.engine.submitted.get()
        s.engine.streams[request_id].put(token(1))
        calling.cancel()
        await asyncio.wait_for(s.engine.abort_happened.wait(), 5)

    assert s.engine.aborted == [request_id]


async def test_draining_refuses_new_calls_and_ends_running_ones_with_a_reason() -> None:
    async with http_served() as s, s.client.stream("POST", "/v1/completions", json=TEXT | {"stream": True}) as response:
        await s.engine.submitted.get()
        draining = asyncio.create_task(s.server.drain(grace_s=0.2))
        await s.engine.draining.wait()
        refused = await s.client.post("/v1/completions", json=TEXT)
        pieces = await events(response)
        await draining

    assert (refused.status_code, error_of(refused)["code"]) == (503, "DRAINING")
    assert pieces[-2]["error"]["code"] == "DRAINING"


async def test_a_server_that_loads_its_model_says_so() -> None:
    async with http_served(started=False) as s:
        response = await s.client.post("/v1/completions", json=TEXT)
        health = await s.client.get("/health")

    assert (response.status_code, error_of(response)["code"]) == (503, "STARTING")
    assert response.headers["retry-after"] == "1"
    assert health.status_code == 503


async def test_a_client_that_does_not_read_is_held_and_then_dropped() -> None:
    """Its request is paused while it does not read, and its connection closed in the end; nobody else notices."""
    async with http_served(write_timeout_s=1.5) as s:
        silent = socket.create_connection(("127.0.0.1", s.port))
        silent.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        body = '{"model":"fake","prompt":"hello","stream":true}'
        silent.sendall(f"{head}content-length: {len(body)}\r\n\r\n{body}".encode())
        request_id = await s.engine.submitted.get()
        stream = s.engine.streams[request_id]
        for _ in range(200):
            stream.put(token(1, "x" * 100_000))
            await asyncio.sleep(0)
        await asyncio.wait_for(s.engine.abort_happened.wait(), 10)
        s.engine.script = [finished()]
        other = await s.client.post("/v1/completions", json=TEXT)
        silent.close()

    assert s.engine.aborted == [request_id]
    assert other.status_code == 200
