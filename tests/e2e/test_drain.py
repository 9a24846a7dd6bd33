"""SIGTERM to a real server: what runs is finished, what comes is refused, and the exit code says that all went well."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from support.pipelined import SERVE_OPTIONS

from gralora_server import Client
from gralora_server.client import UnavailableError

from .conftest import GRALORA


def ask_for_ever(client: Client) -> None:
    """Until it is refused: a signal takes a moment to arrive."""
    while True:
        client.generate("too late", max_tokens=1)


def test_sigterm_finishes_running_streams_and_refuses_new_ones(tiny_workspace: Path) -> None:
    model, adapters = tiny_workspace / "model", tiny_workspace / "adapters"
    command = [GRALORA, "serve", "--model", model, "--adapters", adapters, "--address", "127.0.0.1:0", "--json"]
    command += SERVE_OPTIONS
    with subprocess.Popen([*map(str, command), "--threads", "1"], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        address = json.loads(server.stdout.readline())["address"]
        with Client(address, max_attempts=1) as client:
            client.info()  # the connection is there before the listener goes
            with client.stream("hello", adapter="a0", max_tokens=450, ignore_eos=True) as stream:
                next(stream)
                server.terminate()
                with pytest.raises(UnavailableError):
                    ask_for_ever(client)
                finished = stream.read()

        assert finished.usage.output_tokens == 450
        assert server.wait(60) == 0
