"""Starting, draining, dying: what clients and probes see at each turn."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2
from support.fake_engine import FakeEngine, finished, token
from support.grpc_harness import Client, ask, ask_once, failure, read_all, served

from gralora.v1 import adapters_pb2, server_pb2
from gralora_runtime.errors import ConfigError, EngineDeadError
from gralora_server.config import ServerConfig
from gralora_server.parts import SERVICES
from gralora_server.service import STARTING_COLLECTS_AT, GrpcServer, serve

Code = grpc.StatusCode
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
LONG_S = 3600.0


async def health_of(client: Client) -> set[int]:
    """Of the server and of each of its services."""
    requests = [health_pb2.HealthCheckRequest(service=name) for name in ("", *SERVICES)]
    return {(await client.health.Check(request)).status for request in requests}


async def test_while_the_model_loads_the_port_answers_that_it_does() -> None:
    async with served(started=False) as s:
        health = await health_of(s.client)
        calls = [
            s.client.generation.Generate(ask_once()),
            read_all(s.client.generation.StreamGenerate(ask())),
            s.client.server.GetServerInfo(server_pb2.GetServerInfoRequest()),
            s.client.adapters.ListAdapters(adapters_pb2.ListAdaptersRequest()),
        ]
        failures = [await failure(call) for call in calls]

    assert health == {NOT_SERVING}
    assert {failed.code for failed in failures} == {Code.UNAVAILABLE}
    assert {failed.info.reason for failed in failures} == {"STARTING"}
    assert {failed.trailers["grpc-retry-pushback-ms"] for failed in failures} == {"1000"}


async def test_health_says_serving_once_the_engine_is_there() -> None:
    async with served() as s:
        assert await health_of(s.client) == {SERVING}


async def test_health_of_an_unknown_service_is_not_found() -> None:
    async with served() as s:
        failed = await failure(s.client.health.Check(health_pb2.HealthCheckRequest(service="ghost")))

    assert failed.code is Code.NOT_FOUND


async def test_all_watchers_hear_of_a_drain_after_another_watcher_left() -> None:
    """With grpcio-health-checking's servicer the first to leave took the others' notifications with it."""
    async with served() as s:
        first, *others = [s.client.health.Watch(health_pb2.HealthCheckRequest()) for _ in range(3)]
        before = [(await watch.read()).status for watch in (first, *others)]
        first.cancel()
        await s.server.drain(LONG_S)
        after = [(await asyncio.wait_for(watch.read(), 10)).status for watch in others]
        for watch in others:
            watch.cancel()

    assert before == [SERVING] * 3
    assert after == [NOT_SERVING] * 2


async def test_a_drain_lets_running_streams_finish_and_takes_no_new_work() -> None:
    async with served() as s:
        running = s.client.generation.StreamGenerate(ask())
        await running.read()
        drain = asyncio.ensure_future(s.server.drain(LONG_S))
        await s.engine.draining.wait()
        health = await health_of(s.client)
        refused = [
            await failure(s.client.generation.Generate(ask_once("r2"))),
            await failure(read_all(s.client.generation.StreamGenerate(ask("r3")))),
            await failure(s.client.adapters.LoadAdapter(adapters_pb2.LoadAdapterRequest(name="bard"))),
        ]
        load = await s.client.server.GetLoad(server_pb2.GetLoadRequest())
        was_waiting = not drain.done()
        for delta in (token(1), finished(output_tokens=1)):
            s.engine.streams["r1"].put(delta)
        messages = await read_all(running)
        await asyncio.wait_for(drain, 10)

    assert health == {NOT_SERVING}
    assert {failed.code for failed in refused} == {Code.UNAVAILABLE}
    assert {failed.info.reason for failed in refused} == {"DRAINING"}
    assert load.running == 1
    assert was_waiting
    assert messages[-1].HasField("finished")
    assert s.engine.aborted == []


async def test_past_the_grace_what_runs_is_ended_with_a_status_that_says_so() -> None:
    async with served() as s:
        stream = s.client.generation.StreamGenerate(ask("r1"))
        await stream.read()
        unary = s.client.generation.Generate(ask_once("r2"))
        assert {await s.engine.submitted.get() for _ in range(2)} == {"r1", "r2"}
        await asyncio.wait_for(s.server.drain(0.05), 10)
        failures = [await failure(read_all(stream)), await failure(unary)]

    assert {failed.code for failed in failures} == {Code.UNAVAILABLE}
    assert {failed.info.reason for failed in failures} == {"DRAINING"}
    assert {failed.message for failed in failures} == {"the server is shutting down"}
    assert sorted(s.engine.aborted) == ["r1", "r2"]


async def test_a_client_that_cancels_during_a_drain_is_cancelled_not_drained() -> None:
    async with served() as s:
        call = s.client.generation.StreamGenerate(ask())
        await call.read()
        drain = asyncio.ensure_future(s.server.drain(LONG_S))
        call.cancel()
        await asyncio.wait_for(drain, 10)

        assert await call.code() is Code.CANCELLED
    assert s.engine.aborted == ["r1"]


async def test_two_servers_do_not_share_a_port() -> None:
    async with served() as s:
        with pytest.raises(ConfigError, match=str(s.port)):
            await GrpcServer(ServerConfig(port=s.port)).start()


@asynccontextmanager
async def serving(engine: FakeEngine, **settings: object) -> AsyncIterator[tuple[Client, asyncio.Task[None]]]:
    """The whole of `serve`, signal handlers included, in a task."""
    bound: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def factory() -> FakeEngine:
        return engine

    config = ServerConfig(port=0, **settings)
    task = asyncio.ensure_future(serve(config, factory, on_bound=bound.set_result))
    port = await asyncio.wait_for(bound, 10)
    options = (("grpc.use_local_subchannel_pool", 1),)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
        client = Client(channel)
        watch = client.health.Watch(health_pb2.HealthCheckRequest())
        while (await asyncio.wait_for(watch.read(), 10)).status != SERVING:
            pass
        watch.cancel()
        try:
            yield client, task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
async def test_a_signal_drains_and_ends_without_an_error(number: signal.Signals) -> None:
    engine = FakeEngine()
    async with serving(engine) as (client, task):
        call = client.generation.StreamGenerate(ask())
        await call.read()
        os.kill(os.getpid(), number)
        await engine.draining.wait()
        assert not task.done()
        engine.streams["r1"].put(finished())
        messages = await read_all(call)
        await asyncio.wait_for(task, 10)

    assert messages[-1].HasField("finished")
    assert engine.closed


async def test_a_second_signal_stops_at_once() -> None:
    engine = FakeEngine()
    async with serving(engine, drain_grace_s=LONG_S) as (client, task):
        call = client.generation.StreamGenerate(ask())
        await call.read()
        os.kill(os.getpid(), signal.SIGTERM)
        await engine.draining.wait()
        os.kill(os.getpid(), signal.SIGTERM)
        failed = await failure(read_all(call))
        await asyncio.wait_for(task, 10)

    assert failed.code is Code.UNAVAILABLE
    assert failed.info.reason == "DRAINING"
    assert engine.closed


async def test_when_the_engine_dies_streams_fail_health_falls_and_serve_raises() -> None:
    engine = FakeEngine()
    async with serving(engine) as (client, task):
        watch = client.health.Watch(health_pb2.HealthCheckRequest())
        seen = [(await watch.read()).status]
        call = client.generation.StreamGenerate(ask())
        await call.read()
        engine.die()
        seen.append((await watch.read()).status)
        failed = await failure(read_all(call))
        with pytest.raises(EngineDeadError):
            await asyncio.wait_for(task, 10)

    assert seen == [SERVING, NOT_SERVING]
    assert failed.code is Code.INTERNAL
    assert failed.info.metadata["error_id"] in failed.message
    assert engine.closed


async def test_an_engine_that_dies_while_draining_is_no_clean_end() -> None:
    engine = FakeEngine()
    async with serving(engine) as (client, task):
        call = client.generation.StreamGenerate(ask())
        await call.read()
        os.kill(os.getpid(), signal.SIGTERM)
        await engine.draining.wait()
        engine.die()
        failed = await failure(read_all(call))
        with pytest.raises(EngineDeadError):
            await asyncio.wait_for(task, 10)

    assert failed.code is Code.INTERNAL


async def test_what_was_used_is_there_after_a_restart(tmp_path: Path) -> None:
    """Also what a stream used that the drain cut short."""
    for number in range(1, 3):
        engine = FakeEngine()
        async with serving(engine, state_dir=tmp_path, drain_grace_s=0.0) as (client, task):
            call = client.generation.StreamGenerate(ask(adapter="poet"))
            await call.read()
            engine.streams["r1"].put(token(1))
            await call.read()
            (row,) = (await client.server.GetUsage(server_pb2.GetUsageRequest())).usage
            os.kill(os.getpid(), signal.SIGTERM)
            await failure(read_all(call))
            await asyncio.wait_for(task, 10)

        assert (row.adapter, row.requests, row.prompt_tokens, row.output_tokens) == ("poet", number, 3 * number, number)


async def test_usage_that_cannot_be_kept_ends_the_server_before_its_model_loads(tmp_path: Path) -> None:
    async def factory() -> FakeEngine:
        raise AssertionError

    (tmp_path / "usage.sqlite").write_bytes(b"x" * 5000)
    with pytest.raises(ConfigError, match=r"usage cannot be kept in .*usage\.sqlite: it cannot be"):
        await asyncio.wait_for(serve(ServerConfig(port=0, state_dir=tmp_path), factory), 10)


async def test_a_model_that_does_not_load_ends_the_server_with_its_error() -> None:
    async def factory() -> FakeEngine:
        raise ConfigError("no such model")

    with pytest.raises(ConfigError, match="no such model"):
        await asyncio.wait_for(serve(ServerConfig(port=0), factory), 10)


async def test_a_signal_while_the_model_loads_ends_the_server() -> None:
    loading, abandoned = asyncio.Event(), asyncio.Event()

    async def factory() -> FakeEngine:
        loading.set()
        try:
            await asyncio.Event().wait()
        finally:
            abandoned.set()
        raise AssertionError

    task = asyncio.ensure_future(serve(ServerConfig(port=0), factory))
    await loading.wait()
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.wait_for(task, 10)
    await asyncio.wait_for(abandoned.wait(), 10)


@pytest.fixture
def usual() -> Iterator[tuple[int, int, int]]:
    """When the garbage collector looks: as nothing else here sets it."""
    before, usual = gc.get_threshold(), (701, 11, 12)
    gc.set_threshold(*usual)
    yield usual
    gc.set_threshold(*before)


async def test_the_garbage_collector_rests_while_the_model_loads_and_then_passes_over_it(
    usual: tuple[int, int, int],
) -> None:
    """What is made then is millions of objects, which all stay."""
    at_start: list[tuple[int, int, int]] = []
    made: list[list[object]] = []
    looked_at: list[bool] = []

    async def factory() -> FakeEngine:
        at_start.append(gc.get_threshold())
        made.append([])
        return FakeEngine()

    def on_serving(_port: int) -> None:
        looked_at.append(any(one is made[0] for one in gc.get_objects()))
        os.kill(os.getpid(), signal.SIGTERM)

    await asyncio.wait_for(serve(ServerConfig(port=0), factory, on_serving=on_serving), 10)

    assert at_start == [(STARTING_COLLECTS_AT, *usual[1:])]
    assert gc.get_threshold() == usual
    assert looked_at == [False]


async def test_the_garbage_collector_is_as_it_was_after_a_start_that_failed(usual: tuple[int, int, int]) -> None:
    async def factory() -> FakeEngine:
        raise ConfigError("no such model")

    with pytest.raises(ConfigError):
        await asyncio.wait_for(serve(ServerConfig(port=0), factory), 10)

    assert gc.get_threshold() == usual


@pytest.mark.parametrize(
    "settings",
    [
        {"port": -1},
        {"port": 65536},
        {"max_message_bytes": 0},
        {"max_request_s": 0},
        {"write_timeout_s": 0},
        {"drain_grace_s": -1},
        {"max_connection_age_s": 0},
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        ServerConfig(**settings)
