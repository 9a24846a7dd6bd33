"""Foreign clients of KServe's protocol against a server in a process of its own: grpcurl, and NVIDIA's."""

from __future__ import annotations

import base64
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.grpcurl import grpcurl, objects

from e2e.conftest import assert_idle, serving
from gralora_server import Client

SERVICE = "inference.GRPCInferenceService"
SCRIPT = Path(__file__).parent.parent / "support" / "triton_client.py"
SAMPLING = {"sampling_parameters": {"string_param": json.dumps({"temperature": 0, "max_tokens": 5})}}
ASKED = {"model_name": "a0", "id": "7", "parameters": {"text_input": {"string_param": "hello"}} | SAMPLING}


@pytest.fixture(scope="module")
def server(tiny_workspace: Path) -> Iterator[str]:
    with serving(tiny_workspace / "model", tiny_workspace / "adapters", "--threads", "1", "--kserve") as address:
        yield address


def text_of(answer: dict[str, Any]) -> str:
    return base64.b64decode(answer["raw_output_contents"][0])[4:].decode()


def test_grpcurl_finds_it_and_generates(server: str) -> None:
    """By parameters alone: no tensor has to be packed by hand."""
    services = grpcurl(server, "list").split()
    answer = json.loads(grpcurl("-d", json.dumps(ASKED), server, f"{SERVICE}/ModelInfer"))
    pieces = {"stream": {"bool_param": True}} | ASKED["parameters"]
    body = "".join(json.dumps(ASKED | {"id": str(number), "parameters": pieces}) for number in range(2))
    streamed = [one["infer_response"] for one in objects(grpcurl("-d", body, server, f"{SERVICE}/ModelStreamInfer"))]

    assert SERVICE in services
    assert (answer["model_name"], answer["model_version"], answer["id"]) == ("a0", "1", "7")
    for number in range(2):
        text = "".join(text_of(one) for one in streamed if one["id"] == str(number))
        assert "hello" + text == text_of(answer)


def test_grpcurl_sees_an_error_with_its_details(server: str) -> None:
    asked = ASKED | {"model_name": "nobody"}
    error = grpcurl("-d", json.dumps(asked), server, f"{SERVICE}/ModelInfer", expect=69)

    assert "Code: NotFound" in error
    assert "ADAPTER_NOT_FOUND" in error


@pytest.mark.skipif(importlib.util.find_spec("tritonclient") is None, reason="tritonclient is not installed")
def test_nvidias_client_is_served(server: str) -> None:
    with Client(server) as client:
        expected = client.generate("hello", adapter="a1", max_tokens=5, temperature=0).text
    command = [sys.executable, str(SCRIPT), server, "model", "a1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    got = json.loads(done.stdout)

    assert (got["live"], got["ready"], got["models_ready"]) == (True, True, [True, True, False])
    assert got["server"]["name"] == "gralora"
    assert got["metadata"]["versions"] == ["1"]
    assert got["config"]["model_transaction_policy"] == {"decoupled": True}
    assert {model["name"] for model in got["index"]} >= {"model", "a0", "a1", "a2"}
    assert got["infer"] == "hello" + expected
    assert {got["lora_name"], got["parameters"], got["aio"]["infer"]} == {got["infer"]}
    assert got["unknown"] == ["StatusCode.NOT_FOUND", "no adapter named 'nobody' is registered"]
    assert (got["unloaded"], got["loaded"]) == (False, True)

    *pieces, last = got["streamed"]
    assert "hello" + "".join(piece["text"] for piece in pieces) == got["infer"]
    assert last == {"id": "9", "text": None, "final": True}
    assert not any(piece["final"] for piece in pieces)
    assert set(got["aio"]["texts"]) == {"0", "1"}
    assert "hello" + got["aio"]["texts"]["1"] == got["infer"]
    assert got["aio"]["errors"] == ["ADAPTER_NOT_FOUND: no adapter named 'nobody' is registered"]
    assert got["aio"]["left"] is False
    with Client(server) as client:
        assert_idle(client)
