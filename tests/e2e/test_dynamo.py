"""NVIDIA Dynamo, unmodified, in front of two servers that have different adapters: `make dynamo-test` installs it."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from benchmarks.dynamo_processes import PATIENCE_S, PYTHON, Dynamo, Reply, call, running, why_not
from e2e.conftest import assert_idle, serving
from gralora_server import Client
from gralora_server.client import FinishReason

QUESTION = "stop here then the quick"
SIZES = ("--max-num-seqs", "2", "--max-queue", "4", "--threads", "1")
LONG = 300
CROWD = 48  # many more than may run and wait in two servers


@dataclass(frozen=True, slots=True)
class Stack:
    """`first` has the adapters a0 and a1, `second` b0; both have one base model, called "model"."""

    dynamo: Dynamo
    first: Client
    second: Client
    adapters: Path  # the first server's

    def complete(self, model: str, **more: Any) -> Reply:
        asked = {"model": model, "prompt": QUESTION, "max_tokens": 8, "temperature": 0}
        return self.dynamo.ask("/v1/completions", asked | more)

    def served(self) -> tuple[Counter[str], Counter[str]]:
        """Requests that each server has taken on, by adapter."""
        first, second = (
            Counter({row.adapter: row.requests for row in client.usage()}) for client in (self.first, self.second)
        )
        return first, second


@pytest.fixture(scope="module")
def stack(tiny_workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    python = Path(os.environ.get("GRALORA_TEST_DYNAMO", PYTHON))
    if (reason := why_not(python)) is not None:
        pytest.skip(f"no Dynamo: {reason}")
    folder = tmp_path_factory.mktemp("dynamo")
    for theirs, ours in (("first/a0", "a0"), ("first/a1", "a1"), ("second/b0", "a2")):
        shutil.copytree(tiny_workspace / "adapters" / ours, folder / theirs)
    with ExitStack() as stack:
        addresses = [
            stack.enter_context(serving(tiny_workspace / "model", folder / name, *SIZES, "--vllm-grpc"))
            for name in ("first", "second")
        ]
        dynamo = stack.enter_context(running(python, folder / "dynamo", addresses))
        dynamo.wait_until(lambda: dynamo.models() >= {"model", "a0", "a1", "b0"})
        clients = [stack.enter_context(Client(address)) for address in addresses]
        yield Stack(dynamo, *clients, adapters=folder / "first")


@pytest.fixture(autouse=True)
def at_rest(stack: Stack) -> Iterator[None]:
    """Each test leaves both servers with nothing that is held."""
    yield
    assert_idle(stack.first)
    assert_idle(stack.second)


def text_of(reply: Reply) -> str:
    assert reply.status == 200, reply
    return str(reply.body["choices"][0]["text"])


def test_each_server_gets_its_own_adapters_requests_alone(stack: Stack) -> None:
    before = stack.served()
    for _ in range(4):
        for model in ("a0", "a1", "b0"):
            assert stack.complete(model).status == 200
    after = stack.served()

    assert after[0] - before[0] == {"a0": 4, "a1": 4}
    assert after[1] - before[1] == {"b0": 4}


@pytest.mark.parametrize(("model", "adapter"), [("a0", "a0"), ("a1", "a1"), ("model", "")])
def test_an_answer_is_that_of_the_server(stack: Stack, model: str, adapter: str) -> None:
    expected = stack.first.generate(QUESTION, adapter=adapter, max_tokens=8, temperature=0)

    assert text_of(stack.complete(model)) == expected.text


def test_the_base_models_requests_are_shared_out(stack: Stack) -> None:
    before = stack.served()
    for _ in range(6):
        assert stack.complete("model").status == 200
    first, second = (after - then for after, then in zip(stack.served(), before, strict=True))

    assert (first[""], second[""]) == (3, 3)


def test_a_conversation_goes_by_the_models_template(stack: Stack) -> None:
    turns = [{"role": "user", "content": QUESTION}]
    expected = stack.first.generate(messages=turns, adapter="a0", max_tokens=8, temperature=0)
    asked = {"model": "a0", "messages": turns, "max_tokens": 8, "temperature": 0}
    reply = stack.dynamo.ask("/v1/chat/completions", asked)

    assert reply.status == 200, reply
    assert reply.body["choices"][0]["message"]["content"] == expected.text
    assert reply.body["usage"]["completion_tokens"] == len(expected.token_ids)


def test_a_stream_has_the_same_text(stack: Stack) -> None:
    expected = stack.first.generate(QUESTION, adapter="a0", max_tokens=8, temperature=0)

    assert "".join(pieces(stack, "a0", max_tokens=8)) == expected.text


@pytest.mark.parametrize(
    ("asked", "answers"),
    [
        ({"guided_choice": ["yes", "no"]}, {"yes", "no"}),
        ({"guided_regex": "[ab]!"}, {"a!", "b!"}),
        ({"guided_json": {"enum": ["yes", "no"]}}, {'"yes"', '"no"'}),
        ({"guided_grammar": 'start: "a!" | "b!"'}, {"a!", "b!"}),
    ],
    ids=["choice", "regex", "json", "grammar"],
)
def test_an_answer_matches_what_it_has_to(stack: Stack, asked: dict[str, Any], answers: set[str]) -> None:
    assert text_of(stack.complete("a0", max_tokens=50, **asked)) in answers


@pytest.mark.parametrize("count", [1, 5])
def test_the_sidecar_takes_log_probabilities(stack: Stack, count: int) -> None:
    """It counts them, their ranks and their rivals. The frontend then leaves its lists empty, as it does for any worker
    that makes the text itself.
    """
    expected = stack.first.generate(QUESTION, adapter="a0", max_tokens=4, temperature=0)

    assert text_of(stack.complete("a0", max_tokens=4, logprobs=count)) == expected.text


def test_an_adapter_is_loaded_listed_asked_unloaded_and_gone(stack: Stack) -> None:
    """On one server: the other is asked nothing."""
    sidecar = stack.dynamo.sidecars[0]
    source = {"uri": (stack.adapters / "a1").as_uri()}
    loaded = call(sidecar, "POST", "/v1/loras", {"lora_name": "fresh", "source": source})
    listed = call(sidecar, "GET", "/v1/loras").body
    stack.dynamo.wait_until(lambda: "fresh" in stack.dynamo.models())
    before = stack.served()
    texts = {text_of(stack.complete("fresh")) for _ in range(3)}
    first, second = (after - then for after, then in zip(stack.served(), before, strict=True))
    unloaded = call(sidecar, "DELETE", "/v1/loras/fresh")
    stack.dynamo.wait_until(lambda: "fresh" not in stack.dynamo.models())
    gone = stack.complete("fresh")

    assert (loaded.status, loaded.body["status"]) == (200, "success"), loaded
    assert set(listed["loras"]) == {"a0", "a1", "fresh"}
    assert texts == {text_of(stack.complete("a1"))}
    assert (first, second) == ({"fresh": 3}, {})
    assert (unloaded.status, unloaded.body["status"]) == (200, "success"), unloaded
    assert gone.status == 404
    assert "fresh" not in {adapter.name for adapter in stack.first.adapters.list()}


def test_an_adapter_that_cannot_be_loaded_is_refused_with_the_reason(stack: Stack, tmp_path: Path) -> None:
    shutil.copytree(stack.adapters / "a0", tmp_path / "outside")
    source = {"uri": (tmp_path / "outside").as_uri()}
    reply = call(stack.dynamo.sidecars[0], "POST", "/v1/loras", {"lora_name": "outside", "source": source})

    assert "source_path" in json.dumps(reply.body)
    assert "outside" not in stack.dynamo.models()


def test_a_request_that_cannot_be_served_is_the_clients_fault(stack: Stack) -> None:
    """And the worker stays."""
    refused = stack.complete("a0", top_p=0.5, guided_regex="(")

    assert refused.status == 400, refused
    assert stack.complete("a0").status == 200


def test_a_client_that_leaves_frees_its_pages(stack: Stack) -> None:
    stream = pieces(stack, "a0", max_tokens=LONG, ignore_eos=True)
    next(stream)
    during = stack.first.load()
    stream.close()

    assert during.pages_leased > 0
    assert_idle(stack.first)
    assert stack.first.load().generated_tokens < during.generated_tokens + LONG


def test_overload_takes_no_worker_out_of_rotation(stack: Stack) -> None:
    """Many are refused. Whoever comes right after that is told by the server whether there is room, and not by Dynamo
    that there is none to ask; and is served at once when there is room again.
    """
    refused = threading.Event()

    def ask(_number: int) -> int:
        status = stack.complete("model", max_tokens=LONG, ignore_eos=True).status
        if status != http.HTTPStatus.OK:
            refused.set()
        return status

    meanwhile = []
    with ThreadPoolExecutor(CROWD) as pool:
        crowd = [pool.submit(ask, number) for number in range(CROWD)]
        assert refused.wait(PATIENCE_S), "nobody was refused"
        while not all(one.done() for one in crowd):
            meanwhile.append(stack.complete("model", max_tokens=1).status)
    statuses = Counter(one.result() for one in crowd)
    before = stack.served()
    afterwards = [stack.complete("model").status for _ in range(4)]
    first, second = (after - then for after, then in zip(stack.served(), before, strict=True))

    assert statuses[200] > 0
    assert meanwhile
    assert {*statuses, *meanwhile} <= {200, 500}
    assert afterwards == [200] * 4
    assert (first[""], second[""]) == (2, 2)


def test_an_answer_that_reaches_its_limit_says_so(stack: Stack) -> None:
    reply = stack.complete("a0", max_tokens=3, ignore_eos=True)
    expected = stack.first.generate(QUESTION, adapter="a0", max_tokens=3, temperature=0, ignore_eos=True)

    assert reply.body["choices"][0]["finish_reason"] == "length"
    assert expected.finish_reason is FinishReason.LENGTH


def pieces(stack: Stack, model: str, **more: Any) -> Iterator[str]:
    """The texts of a stream as they come. Closing it early closes the connection."""
    connection = http.client.HTTPConnection(stack.dynamo.frontend, timeout=PATIENCE_S)
    try:
        asked = {"model": model, "prompt": QUESTION, "temperature": 0, "stream": True} | more
        connection.request("POST", "/v1/completions", json.dumps(asked), {"Content-Type": "application/json"})
        response = connection.getresponse()
        assert response.status == 200, response.read()
        for line in response:
            if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
                for choice in json.loads(line[len(b"data: ") :])["choices"]:
                    yield choice["text"]
    finally:
        connection.close()
