"""Real servers for the tests of the whole: `gralora serve` in a process of its own, stopped by SIGTERM."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.peft_adapters import gralora_config, lora_config
from support.pipelined import SERVE_OPTIONS
from support.workspaces import save_workspace

from gralora_server import Client
from gralora_server.model_fetch import ensure_default_model

EXAMPLES = Path(__file__).parent.parent.parent / "examples" / "adapters"
GRALORA = Path(sys.executable).with_name("gralora")


@contextlib.contextmanager
def serving(model: Path, adapters: Path, *options: str) -> Iterator[str]:
    """Yields the address of a server that is ready; afterwards it must have drained and left with exit code 0."""
    with announced(model, adapters, *options) as announcement:
        yield announcement["address"]


@contextlib.contextmanager
def announced(model: Path, adapters: Path, *options: str) -> Iterator[dict[str, str]]:
    """The same, with all that the server says about itself."""
    command = [GRALORA, "serve", "--model", model, "--adapters", adapters, "--address", "127.0.0.1:0", "--json"]
    command += ["--log-level", "warning", *SERVE_OPTIONS]
    with subprocess.Popen([*map(str, command), *options], stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            line = server.stdout.readline()
            assert line, f"the server did not start: exit code {server.wait(60)}"
            yield json.loads(line)
        finally:
            server.terminate()
            assert server.wait(60) == 0


@pytest.fixture(scope="session")
def smollm2() -> Path:
    return ensure_default_model()


@pytest.fixture(scope="session")
def real_server(smollm2: Path) -> Iterator[str]:
    """SmolLM2 and the eight example adapters."""
    with serving(smollm2, EXAMPLES) as address:
        yield address


@pytest.fixture(scope="session")
def tiny_workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with three adapters; tests may add directories under `adapters`."""
    configs = [gralora_config("llama", 8, 2), gralora_config("llama", 8, 4, hybrid_r=2), lora_config("llama", 5)]
    return save_workspace(tmp_path_factory.mktemp("tiny"), {f"a{i}": config for i, config in enumerate(configs)})


@pytest.fixture(scope="session")
def tiny_announced(tiny_workspace: Path) -> Iterator[dict[str, str]]:
    options = ("--threads", "1", "--http-address", "127.0.0.1:0")
    with announced(tiny_workspace / "model", tiny_workspace / "adapters", *options) as announcement:
        yield announcement


@pytest.fixture(scope="session")
def tiny_server(tiny_announced: dict[str, str]) -> str:
    return tiny_announced["address"]


@pytest.fixture(scope="session")
def tiny_http(tiny_announced: dict[str, str]) -> str:
    """Of the same server, for OpenAI's clients."""
    return f"http://{tiny_announced['http_address']}"


@pytest.fixture
def client(tiny_server: str) -> Iterator[Client]:
    """A client of the tiny server, which must be empty again afterwards."""
    with Client(tiny_server) as client:
        yield client
        assert_idle(client)


def assert_idle(client: Client, timeout_s: float = 20.0) -> None:
    """Nothing is running, waiting, leased or held; waits for what was just cancelled."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        load = client.load()
        left = (load.running, load.waiting, load.waiting_for_adapter, load.pages_leased, load.adapter_leases)
        if not any(left):
            break
        assert time.monotonic() < deadline_s, f"left behind: {load}"
        time.sleep(0.02)
    assert load.pages_free + load.pages_cached == load.pages_total
