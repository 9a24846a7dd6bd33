"""Prometheus itself, as a process that scrapes one server."""

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

NEEDED = pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="prometheus is not installed (apt install prometheus)"
)
STARTING = 503  # what it answers until it has read its files
CONFIG = """
global: {{scrape_interval: 200ms, scrape_timeout: 200ms, evaluation_interval: 200ms}}
scrape_configs:
  - job_name: gralora
    static_configs: [{{targets: ["{target}"]}}]
rule_files: {rules}
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@contextmanager
def prometheus(folder: Path, target: str, rules: tuple[Path, ...] = ()) -> Iterator[str]:
    """Yields its address."""
    (folder / "prometheus.yml").write_text(
        CONFIG.format(target=target, rules=json.dumps([str(path) for path in rules]))
    )
    address = f"127.0.0.1:{free_port()}"
    command = ["prometheus", "--config.file=prometheus.yml", "--storage.tsdb.path=data", "--log.level=error"]
    command += ["--enable-feature=exemplar-storage"]
    with subprocess.Popen([*command, f"--web.listen-address={address}"], cwd=folder) as process:
        try:
            yield address
        finally:
            process.terminate()


def asked(address: str, path: str, **parameters: str) -> Any:
    """What it answers. An expression that it cannot read raises `urllib.error.HTTPError`."""
    url = f"http://{address}/api/v1/{path}?" + urllib.parse.urlencode(parameters)
    with urllib.request.urlopen(url, timeout=10) as answer:
        return json.load(answer)["data"]


def query(address: str, expression: str) -> list[dict[str, Any]]:
    """Nothing while it starts."""
    try:
        result: list[dict[str, Any]] = asked(address, "query", query=expression)["result"]
    except urllib.error.HTTPError as refusal:
        if refusal.code != STARTING:
            raise
        return []
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
