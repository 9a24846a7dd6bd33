"""A server in a child process: what it says when it cannot start, and that nothing of it stays behind."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
from support.tiny_models import save_tiny_model

from gralora_runtime.errors import ConfigError
from gralora_server.loadtest.local_server import running

ADDRESS = ["--address", "127.0.0.1:0", "--log-level", "error"]


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    with (
        pytest.raises(ConfigError, match=r"the server did not start: .*nowhere"),
        running(["serve", "--model", str(tmp_path / "nowhere"), *ADDRESS]),
    ):
        pass


def test_it_ends_with_the_block_and_has_no_memory_when_it_is_gone(tmp_path: Path) -> None:
    model = save_tiny_model("llama", tmp_path / "model")

    with running(["serve", "--model", str(model), *ADDRESS]) as server:
        assert server.memory_bytes
        assert server.memory_bytes > 50_000_000
        assert server.metrics_address is None

    assert not psutil.pid_exists(server.process.pid)
    assert server.memory_bytes is None
