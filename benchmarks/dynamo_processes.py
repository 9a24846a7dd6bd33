"""NVIDIA Dynamo in front of servers of ours, where there is an interpreter that has it: a sidecar for each, a frontend.

It lives in an environment of its own (`make dynamo-test` makes one). Its processes find each other by files, and write
nowhere but into one folder.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.worker import ROOT

PYTHON = ROOT / ".venv-dynamo" / "bin" / "python"
PORTS = range(20_000, 32_768)  # a system port of theirs has 16 bits with a sign
PATIENCE_S = 60.0  # for what takes one or two seconds
LOOK_S = 0.05
LOOPBACK = "127.0.0.1"
LAST_LINES = 20


class DynamoError(Exception):
    """It did not do what it does; the text ends with the last lines that its processes wrote."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back over HTTP. `body`: as JSON, or else the text."""

    status: int
    body: Any


@dataclass(frozen=True, slots=True)
class Dynamo:
    """`frontend`: where OpenAI's API is. `sidecars`: where adapters are loaded, one for each server, in their order."""

    frontend: str
    sidecars: tuple[str, ...]
    folder: Path

    def ask(self, path: str, body: Mapping[str, Any]) -> Reply:
        """Of the frontend."""
        return call(self.frontend, "POST", path, body)

    def models(self) -> set[str]:
        return {model["id"] for model in call(self.frontend, "GET", "/v1/models").body["data"]}

    def wait_until(self, is_so: Callable[[], bool]) -> None:
        """Changes reach the frontend a moment after they happened."""
        end_s = time.monotonic() + PATIENCE_S
        while not is_so():
            if time.monotonic() > end_s:
                raise DynamoError(f"not so after {PATIENCE_S:g} s\n{_last_lines(self.folder)}")
            time.sleep(LOOK_S)


def why_not(python: Path) -> str | None:
    """None if `python` can import it."""
    if not python.exists():
        return f"{python} is not there: make dynamo-test"
    probe = subprocess.run(
        [python, "-c", "import dynamo.frontend, dynamo.vllm.sidecar"],
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
    )
    if probe.returncode == 0:
        return None
    lines = probe.stderr.strip().splitlines()
    return lines[-1] if lines else f"exit status {probe.returncode}"


@contextmanager
def running(python: Path, folder: Path, servers: Sequence[str]) -> Iterator[Dynamo]:
    """In front of servers at these addresses, which have `--vllm-grpc`. `folder`: an empty one of its own."""
    (folder / "home").mkdir(parents=True)
    (folder / "tmp").mkdir()
    front, *systems = _free_ports(1 + len(servers))
    dynamo = Dynamo(f"{LOOPBACK}:{front}", tuple(f"{LOOPBACK}:{port}" for port in systems), folder)
    with ExitStack() as stack:
        for number, (server, port) in enumerate(zip(servers, systems, strict=True)):
            command = ["dynamo.vllm.sidecar", "--grpc-endpoint", server]
            environment = _environment(folder) | {"DYN_SYSTEM_PORT": str(port)}
            stack.enter_context(_process(python, command, environment, folder / f"sidecar-{number}.log"))
        command = ["dynamo.frontend", "--http-host", LOOPBACK, "--http-port", str(front)]
        command += ["--router-mode", "round-robin"]
        stack.enter_context(_process(python, command, _environment(folder), folder / "frontend.log"))
        dynamo.wait_until(lambda: _answers(dynamo.frontend) and bool(dynamo.models()))
        yield dynamo


def call(address: str, verb: str, path: str, body: Mapping[str, Any] | None = None) -> Reply:
    """One request over HTTP, on a connection of its own."""
    connection = http.client.HTTPConnection(address, timeout=PATIENCE_S)
    try:
        content = None if body is None else json.dumps(body)
        connection.request(verb, path, content, {} if content is None else {"Content-Type": "application/json"})
        response = connection.getresponse()
        text = response.read().decode()
    finally:
        connection.close()
    try:
        return Reply(response.status, json.loads(text))
    except ValueError:
        return Reply(response.status, text)


def _answers(address: str) -> bool:
    try:
        return call(address, "GET", "/v1/models").status == http.HTTPStatus.OK
    except OSError:
        return False


def _environment(folder: Path) -> dict[str, str]:
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(folder / "home"),
        "TMPDIR": str(folder / "tmp"),
        "HF_HUB_OFFLINE": "1",
        "DYN_DISCOVERY_BACKEND": "file",
        "DYN_FILE_KV": str(folder / "discovery"),
        "DYN_REQUEST_PLANE": "tcp",
        "DYN_EVENT_PLANE": "zmq",
        "DYN_TCP_RPC_HOST": LOOPBACK,
        "DYN_TCP_RESPONSE_STREAM_HOST": LOOPBACK,
        "DYN_EVENT_PLANE_HOST": LOOPBACK,
        "DYN_SYSTEM_HOST": LOOPBACK,
        "DYN_LORA_ENABLED": "true",
        "DYN_LORA_PATH": str(folder / "loras"),
    }


@contextmanager
def _process(python: Path, module: Sequence[str], environment: Mapping[str, str], log: Path) -> Iterator[None]:
    with (
        log.open("w") as output,
        subprocess.Popen(
            [python, "-m", *module], stdout=output, stderr=output, env=dict(environment), cwd=log.parent
        ) as process,
    ):
        try:
            yield
        finally:
            process.terminate()
            try:
                process.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                process.kill()


def _free_ports(count: int) -> list[int]:
    """Below those that a system gives away by itself, so that nobody else gets one in between."""
    held: list[socket.socket] = []
    try:
        for port in random.sample(PORTS, len(PORTS)):
            one = socket.socket()
            try:
                one.bind((LOOPBACK, port))
            except OSError:
                one.close()
                continue
            held.append(one)
            if len(held) == count:
                return [sock.getsockname()[1] for sock in held]
    finally:
        for one in held:
            one.close()
    raise DynamoError("there are no free ports")


def _last_lines(folder: Path) -> str:
    return "\n".join(
        f"{log.name}: {line}"
        for log in sorted(folder.glob("*.log"))
        for line in log.read_text(errors="replace").splitlines()[-LAST_LINES:]
    )
