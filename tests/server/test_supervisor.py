"""A server that is kept up: its process may end in any way, and its clients find somebody who answers."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import grpc
import httpx2
import psutil
import pytest
from grpc_health.v1 import health_pb2
from support.grpc_harness import Client, ask_once, failure, unpack
from support.http_harness import TEXT
from support.supervised_server import HOPELESS, command

from gralora_runtime.errors import ConfigError
from gralora_server.config import HttpConfig, ServerConfig, TlsConfig
from gralora_server.service import STUCK_EXIT_CODE
from gralora_server.supervisor import LONGEST_PAUSE_S, STEADY_S, Backoff, supervise

PEMS = Path(__file__).parent / "tls"
MUTUAL_TLS = TlsConfig(certificate=PEMS / "server.pem", private_key=PEMS / "server.key", client_ca=PEMS / "ca.pem")
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
CONFIG = ServerConfig(port=0)
PATIENCE_S = 60.0


class Pauses(Backoff):
    """All of one length."""

    def __init__(self, pause_s: float) -> None:
        super().__init__()
        self.length_s = pause_s
        self.begun = asyncio.Event()

    def pause_s(self, served_s: float) -> float:
        self.begun.set()
        return self.length_s


@dataclass(frozen=True, slots=True)
class Supervised:
    """`said`: the lines of all children, in order."""

    port: int
    http_port: int | None
    pauses: Pauses
    said: asyncio.Queue[str]
    task: asyncio.Task[int]

    async def serving(self) -> int:
        """The process of the next child that serves."""
        word, pid = (await asyncio.wait_for(self.said.get(), PATIENCE_S)).split()
        assert word == "serving"
        return int(pid)

    async def code(self) -> int:
        return await asyncio.wait_for(self.task, PATIENCE_S)


@asynccontextmanager
async def supervised(
    folder: Path, *, config: ServerConfig = CONFIG, lives: Sequence[str] = ("serve",), pause_s: float = 0.01
) -> AsyncIterator[Supervised]:
    said: asyncio.Queue[str] = asyncio.Queue()
    ports: asyncio.Future[ServerConfig] = asyncio.get_running_loop().create_future()

    def start(shared: ServerConfig) -> list[str]:
        ports.set_result(shared)
        return command(shared, folder, lives=lives)

    pauses = Pauses(pause_s)
    work = supervise(config, start, settings=lambda: None, say=said.put_nowait, hopeless=HOPELESS, backoff=pauses)
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({task, ports}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            await task
        shared = ports.result()
        yield Supervised(shared.port, shared.http and shared.http.port, pauses, said, task)
    finally:
        if not task.done():
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.wait_for(task, PATIENCE_S)


@asynccontextmanager
async def client_of(port: int, credentials: grpc.ChannelCredentials | None = None) -> AsyncIterator[Client]:
    options = (("grpc.use_local_subchannel_pool", 1),)
    if credentials is not None:
        channel = grpc.aio.secure_channel(f"localhost:{port}", credentials, options=options)
    else:
        channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options)
    async with channel:
        yield Client(channel)


async def reason_of(port: int, credentials: grpc.ChannelCredentials | None = None) -> str:
    """Why a request of a new client is refused for now; "" if it is served."""
    async with client_of(port, credentials) as client:
        try:
            await client.generation.Generate(ask_once(""), timeout=PATIENCE_S)
        except grpc.aio.AioRpcError as error:
            details = unpack(dict(error.trailing_metadata()))
            return details["ErrorInfo"].reason if "RetryInfo" in details else error.details()
        return ""


async def test_a_server_that_is_killed_is_replaced_and_the_port_answers_meanwhile(tmp_path: Path) -> None:
    async with supervised(tmp_path, pause_s=3.0) as s:
        before = await reason_of(s.port)
        first = await s.serving()
        assert await reason_of(s.port) == ""
        os.kill(first, signal.SIGKILL)
        await asyncio.to_thread(gone, first)
        async with client_of(s.port) as client:
            failed = await failure(client.generation.Generate(ask_once(), wait_for_ready=True))
            health = await client.health.Check(health_pb2.HealthCheckRequest())
        second = await s.serving()
        after = await reason_of(s.port)

    assert before == "STARTING"
    assert (failed.code, failed.info.reason) == (grpc.StatusCode.UNAVAILABLE, "ENGINE_RESTARTING")
    assert failed.trailers["grpc-retry-pushback-ms"] == "1000"
    assert health.status == NOT_SERVING
    assert second != first
    assert after == ""


def gone(pid: int) -> None:
    """Wait until it is; the parent collects it."""
    with suppress(psutil.NoSuchProcess):
        psutil.Process(pid).wait(PATIENCE_S)


async def test_the_port_is_not_closed_for_long(tmp_path: Path) -> None:
    """While nobody stands in, it is closed for the pause of two seconds and as long as a server takes to start."""
    refused: list[tuple[float, float]] = []
    over = asyncio.Event()

    def knock(port: int) -> None:
        while not over.is_set():
            began_s = time.monotonic()
            try:
                socket.create_connection(("127.0.0.1", port), PATIENCE_S).close()
            except ConnectionRefusedError:
                refused.append((began_s, time.monotonic()))
            time.sleep(0.001)

    async with supervised(tmp_path, pause_s=2.0) as s:
        first = await s.serving()
        knocking = asyncio.ensure_future(asyncio.to_thread(knock, s.port))
        os.kill(first, signal.SIGKILL)
        os.kill(await s.serving(), signal.SIGKILL)
        await s.serving()
        over.set()
        await knocking

    assert sum(end - began for began, end in refused) + 0.001 * len(refused) < 1.0


async def test_with_tls_for_both_sides_it_is_the_same(tmp_path: Path) -> None:
    pair = [(PEMS / name).read_bytes() for name in ("client.key", "client.pem")]
    credentials = grpc.ssl_channel_credentials((PEMS / "ca.pem").read_bytes(), *pair)
    async with supervised(tmp_path, config=replace(CONFIG, tls=MUTUAL_TLS)) as s:
        before = await reason_of(s.port, credentials)
        await s.serving()
        after = await reason_of(s.port, credentials)

    assert (before, after) == ("STARTING", "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
async def test_a_signal_is_the_childs_and_ends_both(tmp_path: Path, number: signal.Signals) -> None:
    async with supervised(tmp_path) as s:
        child = await s.serving()
        os.kill(os.getpid(), number)
        assert await s.code() == 0

    assert not psutil.pid_exists(child)


async def test_to_read_its_files_again_is_the_childs_as_well(tmp_path: Path) -> None:
    async with supervised(tmp_path) as s:
        os.kill(os.getpid(), signal.SIGHUP)  # nobody serves yet: it would end the child
        await s.serving()
        os.kill(os.getpid(), signal.SIGHUP)

        assert await asyncio.wait_for(s.said.get(), PATIENCE_S) == "hup"


async def test_a_child_that_knows_nothing_to_read_again_ends_with_its_terminal(tmp_path: Path) -> None:
    async with supervised(tmp_path, lives=["serve-deaf"]) as s:
        await s.serving()
        os.kill(os.getpid(), signal.SIGHUP)
        assert await s.code() == 0


async def test_a_signal_ends_it_while_there_is_no_child(tmp_path: Path) -> None:
    async with supervised(tmp_path, lives=["crash"], pause_s=3600.0) as s:
        await asyncio.wait_for(s.pauses.begun.wait(), PATIENCE_S)
        os.kill(os.getpid(), signal.SIGTERM)
        assert await s.code() == 0


async def test_settings_that_cannot_work_end_it(tmp_path: Path) -> None:
    async with supervised(tmp_path, lives=["refuse"]) as s:
        assert await s.code() == HOPELESS


async def test_settings_that_have_worked_are_tried_again(tmp_path: Path) -> None:
    """Memory may be short for a while, or a disk gone."""
    async with supervised(tmp_path, lives=["crash", "serve", "refuse", "refuse", "serve"]) as s:
        first = await s.serving()
        os.kill(first, signal.SIGKILL)
        await s.serving()

    assert (tmp_path / "starts").read_text() == "xxxxx"


async def test_a_server_that_is_stuck_ends_itself_with_its_stacks_and_is_replaced(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    async with supervised(tmp_path, lives=["stick", "serve"]) as s:
        stuck = await s.serving()
        assert await s.serving() != stuck
        assert await reason_of(s.port) == ""

    assert f"exit code {STUCK_EXIT_CODE};" in caplog.text
    said = capfd.readouterr().err
    assert "Thread 0x" in said
    assert "supervised_server.py" in said


async def test_a_server_that_was_suspended_is_not_stuck(tmp_path: Path) -> None:
    async with supervised(tmp_path, lives=["serve-busily"]) as s:
        child = await s.serving()
        os.kill(child, signal.SIGSTOP)
        await asyncio.sleep(1.0)  # more than twice as long as a step may take
        os.kill(child, signal.SIGCONT)
        async with client_of(s.port) as client:
            for _ in range(20):
                health = await client.health.Check(health_pb2.HealthCheckRequest())
                assert health.status == health_pb2.HealthCheckResponse.SERVING
                await asyncio.sleep(0.05)
        assert await reason_of(s.port) == ""

    assert (tmp_path / "starts").read_text() == "x"


async def test_http_answers_meanwhile_too(tmp_path: Path) -> None:
    config = replace(CONFIG, http=HttpConfig(host="127.0.0.1", port=0))
    async with supervised(tmp_path, config=config, pause_s=3.0) as s:
        before = await http_answer(s)
        first = await s.serving()
        served = await http_answer(s)
        os.kill(first, signal.SIGKILL)
        await asyncio.to_thread(gone, first)
        between = await http_answer(s)
        await s.serving()
        after = await http_answer(s)

    assert before == (503, "STARTING")
    assert served == after == (200, "")
    assert between == (503, "ENGINE_RESTARTING")


async def http_answer(s: Supervised) -> tuple[int, str]:
    """Of a new connection: a status, and a refusal's reason. Who just ended may still reset it."""
    url = f"http://127.0.0.1:{s.http_port}/v1/completions"
    async with asyncio.timeout(PATIENCE_S), httpx2.AsyncClient(timeout=PATIENCE_S) as client:
        while True:
            with suppress(httpx2.TransportError):
                response = await client.post(url, json=TEXT)
                break
            await asyncio.sleep(0.02)
    assert response.status_code == 200 or "retry-after" in response.headers
    return response.status_code, response.json().get("error", {}).get("code", "")


async def test_a_port_in_use_is_refused_also_by_another_supervisors(tmp_path: Path) -> None:
    async with supervised(tmp_path) as s:
        await s.serving()
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{s.port}"):
            await supervise(
                replace(CONFIG, port=s.port), lambda _: [], settings=lambda: None, say=print, hopeless=HOPELESS
            )


async def test_files_that_are_missing_at_first_end_it(tmp_path: Path) -> None:
    tls = TlsConfig(certificate=tmp_path / "none.pem", private_key=tmp_path / "none.key")
    with pytest.raises(ConfigError, match="cannot be read"):
        await supervise(replace(CONFIG, tls=tls), lambda _: [], settings=lambda: None, say=print, hopeless=HOPELESS)


async def test_files_that_go_missing_later_are_waited_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A certificate that is being exchanged: neither parent nor child can listen without it."""
    paths = [Path(shutil.copy(PEMS / name, tmp_path)) for name in ("server.pem", "server.key", "ca.pem")]
    tls = TlsConfig(certificate=paths[0], private_key=paths[1], client_ca=paths[2])
    async with supervised(tmp_path, config=replace(CONFIG, tls=tls)) as s:
        first = await s.serving()
        key = paths[1].read_bytes()
        paths[1].unlink()
        os.kill(first, signal.SIGKILL)
        await asyncio.wait_for(s.pauses.begun.wait(), PATIENCE_S)
        paths[1].write_bytes(key)
        await s.serving()

    assert "nobody answers until the next server does" in caplog.text


def test_pauses_grow_until_a_server_has_served_for_a_minute() -> None:
    backoff = Backoff()
    pauses = [backoff.pause_s(served_s) for served_s in [0.0] * 8 + [STEADY_S - 1, STEADY_S, 0.0]]

    assert pauses == [1, 2, 4, 8, 16, 32, LONGEST_PAUSE_S, LONGEST_PAUSE_S, LONGEST_PAUSE_S, 1, 2]
