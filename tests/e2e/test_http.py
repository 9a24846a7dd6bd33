"""OpenAI's client and curl against a real server: what they get is what gRPC's client gets."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import httpx2
import openai
import pytest
from support.leaving import leave_after_a_line

from gralora_server import Client

PROMPT = "the quick brown"
ADAPTERS = ["", "a0", "a1", "a2"]


@pytest.fixture
def asked(tiny_http: str):
    with openai.OpenAI(base_url=f"{tiny_http}/v1", api_key="none") as client:
        yield client


def base_of(asked: openai.OpenAI) -> str:
    return next(iter(asked.models.list())).id


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_tokens_are_those_of_grpc_at_once_and_in_events(asked, client: Client, adapter: str) -> None:
    expected = client.generate(PROMPT, adapter=adapter, max_tokens=12, temperature=0)
    question = {"model": adapter or base_of(asked), "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    whole = asked.completions.create(**question, extra_body={"return_token_ids": True})
    pieces = list(asked.completions.create(**question, stream=True))

    assert whole.choices[0].model_extra["token_ids"] == list(expected.token_ids)
    assert whole.choices[0].text == expected.text
    assert "".join(piece.choices[0].text for piece in pieces) == expected.text


def test_seeds_and_log_probabilities_are_those_of_grpc(asked, client: Client) -> None:
    expected = client.generate(PROMPT, adapter="a0", max_tokens=8, temperature=1.0, seed=7, logprobs=True)
    answer = asked.completions.create(
        model="a0", prompt=PROMPT, max_tokens=8, temperature=1.0, seed=7, logprobs=1
    ).choices[0]

    assert answer.text == expected.text
    assert answer.logprobs.token_logprobs == pytest.approx([one.logprob for one in expected.logprobs], abs=1e-5)


def test_an_answer_matches_the_schema_that_was_asked_for(asked, client: Client) -> None:
    small = {"type": "integer", "minimum": 0, "maximum": 99}
    schema = {"type": "object", "properties": {"n": small, "ok": {"type": "boolean"}}}
    schema |= {"required": ["n", "ok"], "additionalProperties": False}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    choice = asked.completions.create(
        model="a0", prompt=PROMPT, max_tokens=300, temperature=0, extra_body={"response_format": wanted}
    ).choices[0]
    with pytest.raises(openai.BadRequestError) as caught:
        asked.completions.create(model="a0", prompt=PROMPT, extra_body={"structured_outputs": {"regex": "("}})

    answer = json.loads(choice.text)
    assert set(answer) == {"n", "ok"}
    assert 0 <= answer["n"] <= 99
    assert choice.finish_reason == "stop"
    assert caught.value.param == "structured_outputs.regex"


def test_a_chat_goes_through_the_model_s_template(asked, client: Client) -> None:
    turns = [{"role": "user", "content": "stop here"}]
    expected = client.generate(messages=turns, adapter="a1", max_tokens=8, temperature=0)
    answer = asked.chat.completions.create(model="a1", messages=turns, max_tokens=8, temperature=0)

    assert answer.choices[0].message.content == expected.text
    assert answer.usage.prompt_tokens == expected.usage.prompt_tokens


def test_an_adapter_is_unloaded_and_loaded_again(asked, client: Client, tiny_http: str, tiny_workspace: Path) -> None:
    shutil.copytree(tiny_workspace / "adapters" / "a0", tiny_workspace / "adapters" / "by-http")
    loaded = httpx2.post(f"{tiny_http}/v1/load_lora_adapter", json={"lora_name": "by-http"}, timeout=30)
    answer = asked.completions.create(model="by-http", prompt=PROMPT, max_tokens=4, temperature=0)
    same = asked.completions.create(model="a0", prompt=PROMPT, max_tokens=4, temperature=0)
    shutil.rmtree(tiny_workspace / "adapters" / "by-http")
    unloaded = httpx2.post(f"{tiny_http}/v1/unload_lora_adapter", json={"lora_name": "by-http"}, timeout=30)

    assert (loaded.status_code, unloaded.status_code) == (200, 200)
    assert answer.choices[0].text == same.choices[0].text
    with pytest.raises(openai.NotFoundError):
        asked.completions.create(model="by-http", prompt=PROMPT)


def test_a_client_that_leaves_frees_everything(asked, client: Client) -> None:
    """`client` looks whether all is free afterwards."""
    stream = asked.completions.create(
        model="a0", prompt=PROMPT, max_tokens=400, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()


def test_an_unknown_adapter_is_an_error_of_its_own(asked) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        asked.completions.create(model="nobody", prompt=PROMPT)

    assert caught.value.code == "ADAPTER_NOT_FOUND"


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl here")
def test_curl(tiny_http: str, client: Client) -> None:
    def curl(path: str, body: object | None = None) -> str:
        data = [] if body is None else ["-H", "Content-Type: application/json", "-d", json.dumps(body)]
        return subprocess.run(
            ["curl", "-sS", "-N", *data, tiny_http + path], capture_output=True, text=True, timeout=60, check=True
        ).stdout

    body = {"model": "a0", "prompt": PROMPT, "max_tokens": 6, "temperature": 0}
    expected = client.generate(PROMPT, adapter="a0", max_tokens=6, temperature=0)
    streamed = curl("/v1/completions", body | {"stream": True}).strip().split("\n\n")
    models = {model["id"] for model in json.loads(curl("/v1/models"))["data"]}

    assert json.loads(curl("/v1/completions", body))["choices"][0]["text"] == expected.text
    assert streamed[-1] == "data: [DONE]"
    assert len(streamed) >= 2  # several tokens may come in one event
    assert {"a0", "a1", "a2"} <= models
    assert json.loads(curl("/health")) == {"status": "SERVING"}
    assert json.loads(curl("/v1/completions", {"model": "a0"}))["error"]["param"] == "prompt"
    assert json.loads(curl("/v1/completions", body | {"model": "nobody"}))["error"]["code"] == "ADAPTER_NOT_FOUND"


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl here")
def test_curl_that_is_ended_frees_everything(tiny_http: str, client: Client) -> None:
    """`client` looks whether all is free afterwards."""
    body = {"model": "a0", "prompt": PROMPT, "max_tokens": 400, "ignore_eos": True, "stream": True}
    command = ["curl", "-sSN", "-H", "Content-Type: application/json", "-d", json.dumps(body)]

    assert leave_after_a_line([*command, f"{tiny_http}/v1/completions"]).startswith("data: {")
