"""`gralora serve --supervise`: what a client sees when the engine's process is killed under it."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

import psutil
from support.pipelined import SERVE_OPTIONS

from e2e.conftest import GRALORA
from gralora_server import Client

PATIENCE_S = 120.0


def test_a_killed_engine_is_back_at_the_same_address_and_none_outlives_its_supervisor(tiny_workspace: Path) -> None:
    options = ["--model", tiny_workspace / "model", "--adapters", tiny_workspace / "adapters", "--threads", "1"]
    command = [GRALORA, "serve", "--supervise", *options, "--address", "127.0.0.1:0", "--json", *SERVE_OPTIONS]
    with subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        address = json.loads(server.stdout.readline())["address"]
        (first,) = psutil.Process(server.pid).children()
        with Client(address) as client:
            expected = client.generate("one two", adapter="a0", max_tokens=8, temperature=0.0).text
            first.kill()
            assert json.loads(server.stdout.readline())["address"] == address
            client.wait_ready(PATIENCE_S)
            assert client.generate("one two", adapter="a0", max_tokens=8, temperature=0.0).text == expected

        (second,) = psutil.Process(server.pid).children()
        server.send_signal(signal.SIGKILL)
        second.wait(PATIENCE_S)
