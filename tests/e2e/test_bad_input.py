"""Bad input over real gRPC: each refused with its exact status and message, while a neighbour's stream goes on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from support.broken_adapters import A_WEIGHT, BREAKAGES, write_broken

from gralora_server import Client
from gralora_server.client import AdapterState, GraloraClientError

from .conftest import assert_idle, serving

BAD_NAME = (
    "must be 1 to 128 letters, digits, '.', '_' or '-' that begin with a letter or a digit; "
    "an organisation and '/' may stand before it, '@' and a revision behind"
)
INVALID, REJECTED = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION

REQUESTS: dict[str, tuple[dict[str, Any], grpc.StatusCode, str]] = {
    "unknown adapter": (
        {"prompt": "x", "adapter": "nobody"},
        grpc.StatusCode.NOT_FOUND,
        "no adapter named 'nobody' is registered",
    ),
    "unknown adapter among several": (
        {"prompt": "x", "adapters": {"a0": 0.5, "nobody": 1.0}},
        grpc.StatusCode.NOT_FOUND,
        "no adapter named 'nobody' is registered",
    ),
    "no name among several": (
        {"prompt": "x", "adapters": {"a0": 0.5, "../a0": 1.0}},
        INVALID,
        f"adapters[1].name: {BAD_NAME} (got '../a0')",
    ),
    "weight 0": ({"prompt": "x", "adapters": {"a0": 0.0}}, INVALID, "adapters[0].weight: must not be 0 (got 0.0)"),
    "one adapter and several": (
        {"prompt": "x", "adapter": "a1", "adapters": {"a0": 1.0}},
        INVALID,
        "adapters: set adapter or adapters, not both (got 'a1')",
    ),
    "traversal": ({"prompt": "x", "adapter": "../a0"}, INVALID, f"adapter: {BAD_NAME} (got '../a0')"),
    "absolute path": ({"prompt": "x", "adapter": "/etc/passwd"}, INVALID, f"adapter: {BAD_NAME} (got '/etc/passwd')"),
    "prompt longer than the model": (
        {"token_ids": [5] * 512},
        INVALID,
        "prompt: the prompt must be shorter than 512 tokens (got 512)",
    ),
    "negative temperature": (
        {"prompt": "x", "temperature": -0.5},
        INVALID,
        "sampling.temperature: must be 0 to 3.40282e+38 (got -0.5)",
    ),
    "empty prompt": ({"prompt": ""}, INVALID, "text: must not be empty (got '')"),
    "10 MB prompt": (
        {"prompt": "a " * 5_000_000},
        INVALID,
        "text: must be at most 4194304 bytes of UTF-8 (got '10000000 bytes')",
    ),
    "message beyond the limit": (
        {"prompt": "a" * 17_000_000},
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "SERVER: Received message larger than max (17000011 vs. 16777216)",
    ),
}

PROBLEMS = {
    "truncated": "adapter_model.safetensors is truncated: {half} bytes instead of {whole}",
    "wrong-shape": f"tensor {A_WEIGHT} has shape [2, 31, 8], the base model needs [2, 32, 8]",
    "nan": f"tensor {A_WEIGHT} has values that are not finite in float32",
    "unknown-type": "peft_type: 'IA3' is not supported (GRALORA and LORA are)",
    "other-base": "it was trained for the base model 'meta/some-other-model'; "
    f"tensor {A_WEIGHT} has shape [2, 96, 8], the base model needs [2, 32, 8]",
    "unsupported": "layer_replication: [[0, 1], [0, 1]] is not supported: it repeats layers of the base model",
    "no-weights": "adapter_model.safetensors is missing",
    "not-json": "adapter_config.json is not JSON",
}


@pytest.fixture(scope="module")
def neighbour(tiny_server: str) -> Iterator[Client]:
    """A client whose stream runs while others misbehave, and has its tokens unharmed at the end."""
    options: dict[str, Any] = {"adapter": "a1", "max_tokens": 400, "temperature": 0.0, "ignore_eos": True}
    with Client(tiny_server) as client:
        expected = client.generate("the neighbour", **options).token_ids
        with client.stream("the neighbour", **options) as stream:
            next(stream)
            yield client
            assert stream.read().token_ids == expected
        assert_idle(client)


@pytest.mark.parametrize("case", REQUESTS)
def test_a_bad_request_gets_its_status_and_message(neighbour: Client, case: str) -> None:
    arguments, code, message = REQUESTS[case]

    with pytest.raises(GraloraClientError) as caught:
        neighbour.generate(**arguments)

    assert caught.value.code is code
    assert caught.value.message == message
    assert neighbour.generate("fine", adapter="a0", max_tokens=2, ignore_eos=True).usage.output_tokens == 2


@pytest.mark.parametrize("kind", BREAKAGES)
def test_loading_a_bad_checkpoint_names_what_is_wrong_and_hurts_nobody(
    neighbour: Client, tiny_workspace: Path, kind: str
) -> None:
    adapters = tiny_workspace / "adapters"
    folder = write_broken(adapters / "a0", kind, adapters)
    size = (adapters / "a0" / "adapter_model.safetensors").stat().st_size

    with pytest.raises(GraloraClientError) as caught:
        neighbour.adapters.load(folder.name)

    problem = PROBLEMS[kind].format(half=size // 2, whole=size)
    assert caught.value.code is REJECTED
    assert caught.value.reason == "ADAPTER_REJECTED"
    assert caught.value.message.startswith(f"adapter {kind!r} cannot be served: {problem}")
    assert neighbour.generate("fine", adapter="a0", max_tokens=2, ignore_eos=True).usage.output_tokens == 2


@pytest.mark.parametrize("path", ["/etc", "../elsewhere", "a0/../../x"])
def test_a_path_outside_of_the_adapters_directory_is_refused(neighbour: Client, path: str) -> None:
    with pytest.raises(GraloraClientError) as caught:
        neighbour.adapters.load("newcomer", path)

    assert caught.value.code is INVALID
    assert caught.value.message == f"path: leaves the adapters directory (got {path!r})"


def test_a_bad_checkpoint_that_is_there_at_start_is_listed_as_failed_and_never_answers(
    tiny_workspace: Path, tmp_path: Path
) -> None:
    good = tiny_workspace / "adapters" / "a0"
    for kind in ("truncated", "unknown-type", "nan"):
        write_broken(good, kind, tmp_path)

    with serving(tiny_workspace / "model", tmp_path, "--threads", "1") as address, Client(address) as client:
        for kind in ("truncated", "unknown-type", "nan"):
            with pytest.raises(GraloraClientError) as caught:
                client.generate("x", adapter=kind)
            assert caught.value.code is REJECTED
        assert {adapter.state for adapter in client.adapters.list()} == {AdapterState.FAILED}
        assert client.generate("x", max_tokens=2, ignore_eos=True).usage.output_tokens == 2
