"""A replica's life without Ray: what it has when it serves, what it leaves, and how it ends when its engine does."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from support.fake_engine import LOAD, FakeEngine, finished
from support.fake_serve import FakeContext
from support.grpc_harness import ask_once

from gralora_runtime.config import EngineConfig
from gralora_runtime.errors import EngineDeadError
from gralora_server.errors import EngineStuckError
from gralora_server.ray.changes import Changes
from gralora_server.ray.places import Place
from gralora_server.ray.replica import Runner, serving
from gralora_server.settings.layers import Layers

GENERATE = "/gralora.v1.GenerationService/Generate"


class Running:
    """Runs replicas with fake engines, and notes what becomes of them."""

    def __init__(self, name: str = "a", log: Changes | None = None) -> None:
        self.engine = FakeEngine()
        self.configs: list[EngineConfig] = []
        self.ended = asyncio.Event()
        self.runner = Runner(
            name=name,
            log=log or Changes(),
            start_engine=self._start,
            give_up=self.ended.set,
            end=self.ended.set,
        )

    async def _start(self, config: EngineConfig) -> FakeEngine:
        self.configs.append(config)
        return self.engine


def layers(tmp_path: Path, **options: object) -> Layers:
    return Layers(None, {}, {"engine.model": str(tmp_path / "model"), **options})


async def test_it_serves_with_the_engine_of_its_settings_and_closes_it(tmp_path: Path) -> None:
    running = Running()
    running.engine.script = [finished()]
    async with serving(layers(tmp_path, **{"engine.max_queue": 7}), running.runner) as replica:
        answer = await replica.grpc.answer(GENERATE, ask_once(), FakeContext())
        num_requests = replica.num_requests
        replica.check()

    assert answer.HasField("finished")
    assert num_requests == LOAD.running + LOAD.waiting + LOAD.waiting_for_adapter + LOAD.paused
    assert (running.configs[0].model, running.configs[0].max_queue) == (tmp_path / "model", 7)
    assert running.engine.closed
    assert running.engine.draining.is_set()


async def test_each_has_a_state_directory_of_its_own_and_the_next_one_finds_it(tmp_path: Path) -> None:
    state, log = tmp_path / "state", Changes()
    placed = layers(tmp_path, **{"adapters.state_dir": str(state)})
    a, b, c = (Running(name, log) for name in "abc")
    async with serving(placed, b.runner):
        async with serving(placed, a.runner):
            pass
        async with serving(placed, c.runner):
            pass

    folders = [running.configs[0].state_dir for running in (b, a, c)]
    assert folders == [state / "replica-0", state / "replica-1", state / "replica-1"]
    assert (state / "replica-0" / "usage.sqlite").exists()


async def test_the_configuration_can_be_read_again_although_the_state_directory_is_its_own(tmp_path: Path) -> None:
    placed = layers(tmp_path, **{"adapters.state_dir": str(tmp_path / "state")})
    async with serving(placed, Running().runner) as replica:
        assert await replica.parts.reloader.reload() == ()


async def test_a_dead_engine_ends_the_replica(tmp_path: Path) -> None:
    running = Running()
    async with serving(layers(tmp_path), running.runner) as replica:
        running.engine.die()
        await asyncio.wait_for(running.ended.wait(), 10)

        with pytest.raises(EngineDeadError):
            replica.check()


async def test_a_stuck_engine_is_unhealthy(tmp_path: Path) -> None:
    async with serving(layers(tmp_path), Running().runner) as replica:
        await replica.parts.set_stuck(True)
        with pytest.raises(EngineStuckError):
            replica.check()
        await replica.parts.set_stuck(False)
        replica.check()


async def test_a_replica_that_does_not_start_leaves_its_place(tmp_path: Path) -> None:
    running = Running()

    async def fail(_config: EngineConfig) -> FakeEngine:
        raise EngineDeadError

    runner = Runner(name="a", log=Changes(), start_engine=fail, give_up=running.ended.set, end=running.ended.set)
    with pytest.raises(EngineDeadError):
        async with serving(layers(tmp_path, **{"adapters.state_dir": str(tmp_path / "state")}), runner):
            pass
    place = Place(tmp_path / "state")
    place.release()

    assert place.folder == tmp_path / "state" / "replica-0"


async def test_its_http_is_the_servers_own(tmp_path: Path) -> None:
    running = Running()
    sent: list[dict[str, object]] = []

    async def receive() -> dict[str, object]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: dict[str, object]) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": "/v1/models", "query_string": b"", "headers": [], "root_path": ""}
    async with serving(layers(tmp_path), running.runner) as replica:
        await replica.http(scope, receive, send)

    assert sent[0]["status"] == 200
    assert b'"poet"' in b"".join(message.get("body", b"") for message in sent[1:])
