"""Another configuration while the server runs: all of it is in force, or nothing."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import signal
import ssl
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from cryptography.hazmat.primitives import serialization
from support.fake_engine import FakeEngine
from support.grpc_harness import Served, failure, served
from support.tenants import OPERATOR, admitting_the_operator, bearing

from gralora.v1 import server_pb2
from gralora_runtime.errors import ConfigError
from gralora_server.config import ServerConfig, TlsConfig
from gralora_server.errors import ConfigInvalidError
from gralora_server.service import serve
from gralora_server.settings.layers import Layers
from gralora_server.settings.reloader import Reloader
from gralora_server.settings.sections import Settings
from gralora_server.tls import ServerCertificate

PEMS = Path(__file__).parent / "tls"
RELOAD = server_pb2.ReloadConfigRequest()
OLD, NEW, GENERATE = "an-old-token-0123456789", "a-new-token-0123456789", "a-weak-token-0123456789"
Code = grpc.StatusCode


class Part:
    """Remembers what was in force, and refuses what it is told to."""

    def __init__(self) -> None:
        self.weights: list[float] = []
        self.refusal: ConfigError | None = None
        self.refused, self.changed = asyncio.Event(), asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def prepare(self, settings: Settings) -> Callable[[], None]:
        if self.refusal is not None:
            self._loop.call_soon_threadsafe(self.refused.set)
            raise self.refusal

        def put() -> None:
            self.weights.append(settings.tenants["acme"].weight)
            self.changed.set()

        return put


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "gralora.toml"
    weigh(path, 1)
    return path


def weigh(file: Path, weight: object, more: str = "") -> None:
    file.write_text(f"[tenants.acme]\nweight = {weight}\n{more}\n{admitting_the_operator()}")


def reloader_of(file: Path) -> Reloader:
    return Reloader(Layers(file, {}, {}).read)


async def test_every_part_gets_what_the_file_says_now(file: Path) -> None:
    reloader, parts = reloader_of(file), [Part(), Part()]
    for part in parts:
        reloader.add(part)
    weigh(file, 2)
    changed = await reloader.reload()

    assert [part.weights for part in parts] == [[2.0], [2.0]]
    assert changed == ("tenants",)
    assert reloader.settings.tenants["acme"].weight == 2.0
    assert await reloader.reload() == ()


async def test_if_one_part_refuses_no_part_changes(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    reloader, parts = reloader_of(file), [Part(), Part(), Part()]
    for part in parts:
        reloader.add(part)
    parts[1].refusal, parts[2].refusal = ConfigError("not with me"), ConfigInvalidError(["nor", "with me"])
    weigh(file, 2)
    with caplog.at_level(logging.ERROR), pytest.raises(ConfigInvalidError) as caught:
        await reloader.reload()

    assert caught.value.problems == ("not with me", "nor", "with me")
    assert [part.weights for part in parts] == [[], [], []]
    assert reloader.settings.tenants["acme"].weight == 1.0
    assert [record.getMessage() for record in caplog.records] == [
        f"the configuration was not reloaded: {problem}" for problem in caught.value.problems
    ]


@pytest.mark.parametrize(
    ("more", "key", "line"),
    [
        ('[server]\naddress = "a:1"', "server.address", 4),
        ("[engine]\nmax_queue = 3", "engine.max_queue", 4),
        ('[engine]\nmodel = "m"', "engine.model", 4),
        ('[adapters]\nsources = ["a"]', "adapters.sources", 4),
        ('[server]\n\ntoken_file = "t"', "server.token_file", 5),
    ],
)
async def test_what_cannot_change_while_the_server_runs_is_refused_by_name(
    more: str, key: str, line: int, file: Path
) -> None:
    reloader, part = reloader_of(file), Part()
    reloader.add(part)
    weigh(file, 2, more)
    with pytest.raises(ConfigInvalidError) as caught:
        await reloader.reload()

    assert caught.value.problems == (f"{key} cannot change while the server runs: restart it ({file}:{line})",)
    assert part.weights == []


async def test_objectives_change_while_the_server_runs(file: Path) -> None:
    reloader = reloader_of(file)
    weigh(file, 1, "[objectives]\nfirst_token_s = 0.5\n")

    assert await reloader.reload() == ("objectives",)
    assert reloader.settings.objectives.first_token_s == 0.5


async def test_an_option_still_counts_before_the_file(file: Path) -> None:
    reloader = Reloader(Layers(file, {}, {"objectives.first_token_s": "0.25"}).read)
    weigh(file, 1, "[objectives]\nfirst_token_s = 0.5\n")

    assert await reloader.reload() == ()
    assert reloader.settings.objectives.first_token_s == 0.25


async def test_reloads_at_the_same_time_take_turns(file: Path) -> None:
    reloader, part = reloader_of(file), Part()
    reloader.add(part)
    weigh(file, 2)
    results = await asyncio.gather(*(reloader.reload() for _ in range(8)))

    assert sorted(results) == [()] * 7 + [("tenants",)]
    assert part.weights == [2.0] * 8


async def test_the_rpc_says_what_changed_or_what_is_wrong(file: Path) -> None:
    part = Part()
    async with served(reloader=reloader_of(file)) as s:
        s.server.reloader.add(part)
        weigh(file, 2)
        answer = await s.client.server.ReloadConfig(RELOAD, metadata=bearing(OPERATOR))
        weigh(file, "'heavy'")
        failed = await failure(s.client.server.ReloadConfig(RELOAD, metadata=bearing(OPERATOR)))

    assert list(answer.changed) == ["tenants"]
    assert failed.code is Code.FAILED_PRECONDITION
    assert failed.info.reason == "CONFIG_INVALID"
    assert failed.message == f"{file}:2: tenants.acme.weight should be a valid number, got 'heavy'"
    assert part.weights == [2.0]


async def test_a_server_that_still_loads_its_model_reloads(file: Path) -> None:
    async with served(started=False, reloader=reloader_of(file)) as s:
        weigh(file, 2)
        answer = await s.client.server.ReloadConfig(RELOAD, metadata=bearing(OPERATOR))

    assert list(answer.changed) == ["tenants"]


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    path = tmp_path / "tokens"
    path.write_text(f"{OLD}\n{GENERATE} generate\n")
    return path


def write(tokens: Path, token: str) -> None:
    tokens.write_text(f"{token}\n")


async def reload_as(s: Served, token: str) -> Code:
    """How the call ends."""
    metadata = (("authorization", f"Bearer {token}"),)
    try:
        await s.client.server.ReloadConfig(RELOAD, metadata=metadata)
    except grpc.aio.AioRpcError as error:
        return error.code()
    return Code.OK


async def test_the_token_file_is_read_again(tokens: Path) -> None:
    async with served(auth_token_file=tokens) as s:
        write(tokens, NEW)
        before = await reload_as(s, NEW)
        reloaded = await reload_as(s, OLD)
        after = [await reload_as(s, token) for token in (OLD, NEW)]

    assert (before, reloaded, after) == (Code.UNAUTHENTICATED, Code.OK, [Code.UNAUTHENTICATED, Code.OK])


async def test_a_broken_token_file_leaves_the_tokens_that_there_are(tokens: Path) -> None:
    async with served(auth_token_file=tokens) as s:
        write(tokens, "short")
        first, second = await reload_as(s, OLD), await reload_as(s, OLD)

    assert (first, second) == (Code.FAILED_PRECONDITION, Code.FAILED_PRECONDITION)


async def test_only_an_admin_reloads(tokens: Path) -> None:
    async with served(auth_token_file=tokens) as s:
        assert await reload_as(s, GENERATE) is Code.PERMISSION_DENIED


@pytest.fixture
def tls(tmp_path: Path) -> TlsConfig:
    for name in ("server.pem", "server.key", "ca.pem"):
        shutil.copy(PEMS / name, tmp_path / name)
    return TlsConfig(certificate=tmp_path / "server.pem", private_key=tmp_path / "server.key")


async def shown_certificate(port: int) -> str:
    """By a new connection."""
    return await asyncio.to_thread(ssl.get_server_certificate, ("127.0.0.1", port), timeout=10)


def pem(path: Path) -> str:
    """The certificate in a file, without what may stand around it."""
    text = path.read_text()
    return text[text.index("-----BEGIN CERTIFICATE") :]


@pytest.mark.parametrize(
    ("name", "content"),
    [("server.pem", b"no certificate"), ("server.key", (PEMS / "client.key").read_bytes()), ("server.key", None)],
    ids=["broken", "another's key", "gone"],
)
async def test_a_certificate_that_cannot_be_used_is_refused_and_the_old_one_is_shown(
    name: str, content: bytes | None, tls: TlsConfig
) -> None:
    credentials = grpc.ssl_channel_credentials((PEMS / "ca.pem").read_bytes())
    path = tls.certificate.parent / name
    async with served(tls=tls, credentials=credentials) as s:
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        failed = await failure(s.client.server.ReloadConfig(RELOAD))
        shown = await shown_certificate(s.port)

    assert failed.info.reason == "CONFIG_INVALID"
    assert str(path) in failed.message
    assert shown == pem(PEMS / "server.pem")


def test_a_key_with_a_password_is_refused_and_nobody_is_asked_for_it(tls: TlsConfig) -> None:
    key = serialization.load_pem_private_key(tls.private_key.read_bytes(), None)
    locked = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"sesame"),
    )
    tls.private_key.write_bytes(locked)

    with pytest.raises(ConfigError, match="assword"):
        ServerCertificate(tls)


def test_a_broken_authority_is_refused_by_name(tls: TlsConfig, tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("no authority")
    mutual = TlsConfig(certificate=tls.certificate, private_key=tls.private_key, client_ca=tmp_path / "ca.pem")

    with pytest.raises(ConfigError, match=r"ca\.pem"):
        ServerCertificate(mutual)


async def test_sighup_reloads_the_file_and_a_wrong_one_changes_nothing(file: Path) -> None:
    reloader, part, serving = reloader_of(file), Part(), asyncio.Event()
    reloader.add(part)

    async def factory() -> FakeEngine:
        return FakeEngine()

    task = asyncio.ensure_future(
        serve(ServerConfig(port=0), factory, reloader=reloader, on_serving=lambda _port: serving.set())
    )
    await asyncio.wait_for(serving.wait(), 10)
    for refusal, happened in ((ConfigError("not now"), part.refused), (None, part.changed)):
        part.refusal = refusal
        weigh(file, 2)
        os.kill(os.getpid(), signal.SIGHUP)
        await asyncio.wait_for(happened.wait(), 10)
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.wait_for(task, 10)

    assert part.weights == [2.0]


async def test_objectives_reach_the_engine_and_one_that_was_still_loading(file: Path) -> None:
    async with served(reloader=reloader_of(file)) as s:
        weigh(file, 1, "[objectives]\nfirst_token_s = 1.5\n")
        await s.server.reloader.reload()
        running = s.engine.first_token_s
        objectives = s.server._objectives
        late = FakeEngine()
        objectives.inform(late)

    assert (running, late.first_token_s) == (1.5, 1.5)
