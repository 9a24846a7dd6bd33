"""Prometheus itself scrapes a loaded server, and answers questions about it."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from gralora_server import Client

from .conftest import announced

CONFIG = """
global: {{scrape_interval: 200ms, scrape_timeout: 200ms}}
scrape_configs:
  - job_name: gralora
    static_configs: [{{targets: ["{target}"]}}]
"""
NUM_OUTPUT = 40


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@contextmanager
def prometheus(folder: Path, target: str) -> Iterator[str]:
    """Yields its address."""
    (folder / "prometheus.yml").write_text(CONFIG.format(target=target))
    address = f"127.0.0.1:{free_port()}"
    command = ["prometheus", "--config.file=prometheus.yml", "--storage.tsdb.path=data", "--log.level=error"]
    with subprocess.Popen([*command, f"--web.listen-address={address}"], cwd=folder) as process:
        try:
            yield address
        finally:
            process.terminate()


def query(address: str, expression: str) -> list[dict[str, Any]]:
    """Nothing while it starts."""
    url = f"http://{address}/api/v1/query?" + urllib.parse.urlencode({"query": expression})
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            result: list[dict[str, Any]] = json.load(answer)["data"]["result"]
    except urllib.error.URLError:
        return []
    return result


def value(address: str, expression: str) -> float | None:
    result = query(address, expression)
    return float(result[0]["value"][1]) if result else None


def until(address: str, expression: str, expected: float, timeout_s: float = 30.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while (found := value(address, expression)) != expected:
        assert time.monotonic() < deadline_s, f"{expression} is {found}, not {expected}"
        time.sleep(0.05)


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed (apt install prometheus)")
def test_prometheus_scrapes_a_loaded_server_and_answers_with_its_numbers(tiny_workspace: Path, tmp_path: Path) -> None:
    options = ("--threads", "1", "--max-num-seqs", "2", "--no-prefix-cache", "--metrics-address", "127.0.0.1:0")
    with (
        announced(tiny_workspace / "model", tiny_workspace / "adapters", *options) as said,
        Client(said["address"]) as client,
        prometheus(tmp_path, said["metrics_address"]) as address,
    ):
        until(address, "up", 1)
        until(address, "gralora_requests_received_total", 0)
        for adapter in ("a0", "a1", "a0"):
            client.generate("hello", adapter=adapter, max_tokens=NUM_OUTPUT, ignore_eos=True)
        until(address, 'gralora_requests_ended_total{outcome="length"}', 3)  # what is counted last

        assert value(address, "gralora_generated_tokens_total") == 3 * NUM_OUTPUT
        assert value(address, 'gralora_requests_ended_total{outcome="length"}') == 3
        assert value(address, 'gralora_adapter_generated_tokens_total{adapter="a0"}') == 2 * NUM_OUTPUT
        assert value(address, "gralora_time_to_first_token_seconds_count") == 3
        assert value(address, "histogram_quantile(0.95, gralora_time_to_first_token_seconds_bucket)") > 0
        assert len(query(address, "gralora_step_phase_seconds_count")) == 6
        assert len(query(address, "vllm:lora_requests_info")) == 1
        assert value(address, "time() - vllm:lora_requests_info") < 60
        assert value(address, "vllm:kv_cache_usage_perc") == 0
        until(address, "rate(gralora_generated_tokens_total[1m]) > bool 0", 1)
