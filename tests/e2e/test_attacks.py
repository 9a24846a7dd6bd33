"""What one client sends and what one directory holds, tried on a real server: a bystander must not notice any of it.

The bystander streams all the time, and compares its tokens; a probe asks for the server's health all the time.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from support.hostile import BOMBS, TRAPS, write_hostile

from gralora.v1 import generation_pb2, generation_pb2_grpc
from gralora_server import Client
from gralora_server.client import AdapterState, GraloraClientError, InvalidArgumentError

from .conftest import announced

pytestmark = pytest.mark.alone

MAX_HEALTH_S, MAX_PAUSE_S = 1.0, 0.2
# The worst that `make fuzz` found, where it ran before.
FUZZED = sorted(Path(os.environ.get("GRALORA_FUZZED_ADAPTERS") or "/nowhere").glob("*/"))
HOSTILE = (*BOMBS, *TRAPS, *(folder.name for folder in FUZZED))
GOOD = ("a0", "a1", "a2")


class Beside:
    """Works in a thread of its own for as long as a block lasts; what it finds wrong fails the test."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._stopped = threading.Event()
        self._errors: list[BaseException] = []
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join(60)
        assert self._errors == []

    def _run(self) -> None:
        try:
            self.work()
        except BaseException as error:
            self._errors.append(error)

    def work(self) -> None:
        raise NotImplementedError


class Bystander(Beside):
    """Streams again and again. `longest_pause_s` is between two messages of one stream."""

    OPTIONS: dict[str, Any] = {"adapter": "a1", "max_tokens": 300, "temperature": 0.0, "ignore_eos": True}  # noqa: RUF012

    def __init__(self, address: str) -> None:
        super().__init__(address)
        self.longest_pause_s = 0.0
        self.streams = 0
        with Client(address) as client:
            self._expected = client.generate("the bystander", **self.OPTIONS).token_ids

    def work(self) -> None:
        with Client(self._address) as client:
            while not self._stopped.is_set():
                self._stream(client)
                self.streams += 1

    def _stream(self, client: Client) -> None:
        tokens: list[int] = []
        last_s: float | None = None
        with client.stream("the bystander", **self.OPTIONS) as stream:
            for delta in stream:
                now_s = time.monotonic()
                if last_s is not None:
                    self.longest_pause_s = max(self.longest_pause_s, now_s - last_s)
                last_s = now_s
                tokens += delta.token_ids
        assert tuple(tokens) == self._expected, "a bystander's tokens changed"


class Probe(Beside):
    """Asks for the server's health every few milliseconds, and has to have its answer in time."""

    def work(self) -> None:
        with grpc.insecure_channel(self._address) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            while not self._stopped.wait(0.02):
                started_s = time.monotonic()
                answer = health.Check(health_pb2.HealthCheckRequest(), timeout=10, wait_for_ready=True)
                assert answer.status == health_pb2.HealthCheckResponse.SERVING
                assert time.monotonic() - started_s < MAX_HEALTH_S


@pytest.fixture(scope="module")
def adapters(tiny_workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three good adapters and all hostile ones."""
    root = tmp_path_factory.mktemp("attacked")
    write_hostile(tiny_workspace / "adapters" / "a0", root)
    for folder in FUZZED:
        shutil.copytree(folder, root / folder.name)
    for name in GOOD:
        shutil.copytree(tiny_workspace / "adapters" / name, root / name)
    return root


@pytest.fixture(scope="module")
def address(tiny_workspace: Path, adapters: Path) -> Iterator[str]:
    """A server over all of them. It has to begin serving, and to drain when SIGTERM comes in mid-attack at the end."""
    with ThreadPoolExecutor(2) as beside:
        with announced(tiny_workspace / "model", adapters, "--threads", "1") as announcement:
            yield announcement["address"]
            client = Client(announcement["address"], max_attempts=1)
            stream = client.stream("the last one", adapter="a1", max_tokens=450, ignore_eos=True)
            next(stream)
            attack = beside.submit(client.adapters.load, "target-two-ways")
            rest = beside.submit(stream.read)
        assert isinstance(attack.exception(30), GraloraClientError)
        assert rest.result(30).usage.output_tokens == 450
        client.close()


@contextlib.contextmanager
def undisturbed(address: str) -> Iterator[Bystander]:
    with Bystander(address) as bystander, Probe(address):
        deadline_s = time.monotonic() + 60
        while bystander.streams == 0:  # it is not warm yet
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
        yield bystander


def longest_pause_s(bystander: Bystander, attack: Callable[[], None]) -> float:
    """Of the stream meanwhile. The least of up to three tries: a pause that the attack causes comes back."""
    pauses_s: list[float] = []
    while len(pauses_s) < 3 and min(pauses_s, default=1.0) >= MAX_PAUSE_S:
        bystander.longest_pause_s = 0.0
        attack()
        time.sleep(0.05)
        pauses_s.append(bystander.longest_pause_s)
    return min(pauses_s)


def test_every_hostile_directory_is_listed_with_its_reason_soon_after_the_start(address: str) -> None:
    deadline_s = time.monotonic() + 120
    with undisturbed(address), Client(address) as client:
        while True:
            listed = {adapter.name: adapter for adapter in client.adapters.list()}
            waiting = [name for name in HOSTILE if listed[name].state is not AdapterState.FAILED]
            if not waiting:
                break
            assert time.monotonic() < deadline_s, waiting
            time.sleep(0.1)
        assert {name for name in listed if listed[name].state is not AdapterState.FAILED} == set(GOOD)
        assert all(f"adapter {name!r} cannot be served: " in listed[name].error for name in HOSTILE)


def test_loading_or_naming_a_hostile_directory_disturbs_no_stream(address: str) -> None:
    pauses_s: dict[str, float] = {}
    with undisturbed(address) as bystander, Client(address, max_attempts=1) as client:
        for name in HOSTILE:

            def attack(name: str = name) -> None:
                for call in (lambda: client.adapters.load(name), lambda: client.generate("x", adapter=name)):
                    with pytest.raises(GraloraClientError) as caught:
                        call()
                    assert caught.value.reason == "ADAPTER_REJECTED"

            pauses_s[name] = longest_pause_s(bystander, attack)

    assert {name: pause_s for name, pause_s in pauses_s.items() if pause_s >= MAX_PAUSE_S} == {}


def test_a_config_that_is_exchanged_before_its_first_request_is_refused_then(
    address: str, adapters: Path, tiny_workspace: Path
) -> None:
    """The scan at start saw a good one."""
    with undisturbed(address), Client(address, max_attempts=1) as client:
        bomb = BOMBS["target-empty-alternatives"]
        config, weights = adapters / "a2" / "adapter_config.json", adapters / "a2" / "adapter_model.safetensors"
        good = config.read_bytes()
        config.write_bytes(bomb(good, weights.read_bytes())[0])
        with pytest.raises(GraloraClientError) as caught:
            client.generate("x", adapter="a2")
        assert caught.value.reason == "ADAPTER_REJECTED"
        config.write_bytes(good)
        assert client.generate("x", adapter="a2", max_tokens=2, ignore_eos=True).usage.output_tokens == 2


EXTREMES: list[dict[str, Any]] = [
    {"temperature": 1e39, "min_tokens": 1},
    {"temperature": 1e308, "top_p": 0.5},
    {"temperature": 1e308, "top_k": 5},
    {"repetition_penalty": 1e-300},
]
LARGEST: list[dict[str, Any]] = [
    {"temperature": 3.4e38, "min_tokens": 1},
    {"temperature": 5e-324, "top_p": 5e-324, "min_p": 1.0},
    {"repetition_penalty": 1.2e-38, "temperature": 3.4e38, "logit_bias": {5: -100.0, 6: 100.0}},
]


def test_numbers_that_no_float32_holds_are_refused_and_those_it_holds_are_served(address: str) -> None:
    with undisturbed(address), Client(address, max_attempts=1) as client:
        for extreme in EXTREMES:
            with pytest.raises(InvalidArgumentError) as caught:
                client.generate("x", max_tokens=4, **extreme)
            assert caught.value.field_violations[0].field.startswith("sampling.")
        for largest in LARGEST:
            with contextlib.suppress(GraloraClientError):  # no token may be left to choose from
                client.generate("x", max_tokens=4, ignore_eos=True, seed=1, **largest)
        assert client.load().step_failures == client.load().request_failures == 0


def test_bytes_that_are_no_message_are_invalid_and_disturb_nobody(address: str) -> None:
    with undisturbed(address), grpc.insecure_channel(address) as channel:
        method = "/gralora.v1.GenerationService/Generate"
        send = channel.unary_unary(method, request_serializer=None, response_deserializer=None)
        for number in range(1000):
            with pytest.raises(grpc.RpcError) as caught:
                send(b"\xff\xff\xff" + number.to_bytes(4, "little"), timeout=10)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        assert stub.Generate(generation_pb2.GenerateRequest(text="fine")).token_ids
