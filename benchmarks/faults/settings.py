"""Configuration, tokens and certificates that are broken: when a running server reads them again, and at its start."""

from __future__ import annotations

import asyncio
import hashlib
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from unittest import SkipTest

from benchmarks.faults.fault import Fault, Outcome
from benchmarks.faults.refused_start import problems_of_start
from benchmarks.faults.seen import Seen
from benchmarks.faults.stage import Stage, Tokens
from gralora_server.client import AsyncClient, ClientTls
from gralora_server.loadtest.local_server import LocalServer

USED = "a0"
OPERATOR, LIMITED, NEWCOMER = "the-operators-token", "a-token-with-few-requests", "a-token-that-comes-later"
BURST, RATE = 2, 0.001  # requests of LIMITED, and how many more come in a second
BROKEN: Mapping[str, Callable[[str], str]] = {
    "no TOML": lambda text: text + "\n[tenants",
    "an unknown key": lambda text: text + "\n[tenants.other]\nweihgt = 2\n",
    "a wrong value": lambda text: text.replace("requests_per_s = 0.001", "requests_per_s = -1"),
    "a token of two tenants": lambda text: text + _tenant("thief", LIMITED),
    "cut off": lambda text: text[: len(text) - 20],
}


@dataclass(frozen=True, slots=True)
class Files:
    """A server's configuration, its tokens and its certificate."""

    folder: Path

    @property
    def settings(self) -> Path:
        return self.folder / "gralora.toml"

    @property
    def tokens(self) -> Path:
        return self.folder / "tokens"

    @property
    def certificate(self) -> Path:
        return self.folder / "server.pem"

    @property
    def key(self) -> Path:
        return self.folder / "server.key"

    def write(self) -> None:
        self.settings.write_text(_tenant("limited", LIMITED, BURST))
        self.tokens.write_text(f"{OPERATOR}\n")
        make = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        make += ["-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"]
        make += ["-keyout", str(self.key), "-out", str(self.certificate)]
        try:
            subprocess.run(make, check=True, capture_output=True)
        except FileNotFoundError as cause:
            raise SkipTest("there is no openssl to make a certificate with") from cause

    def arguments(self) -> list[str]:
        arguments = ["--config", str(self.settings), "--token-file", str(self.tokens)]
        return [*arguments, "--tls-cert", str(self.certificate), "--tls-key", str(self.key)]


def reloaded(stage: Stage) -> Outcome:
    """Each is refused, and what was in force stays so; then a sound one is in force at once."""
    files = Files(stage.folder)
    files.write()
    with stage.server(*files.arguments()) as server:
        return asyncio.run(_Reload(stage, server, files, files.certificate.read_bytes()).run())


@dataclass(frozen=True, slots=True)
class _Reload:
    stage: Stage
    server: LocalServer
    files: Files
    certificate: bytes
    seen: Seen = field(default_factory=Seen)

    async def run(self) -> Outcome:
        seen, files = self.seen, self.files
        async with self._client(OPERATOR) as client:
            right = {name: await self.stage.answer(client, name) for name in self.stage.names}
            async with self._client(LIMITED) as limited:
                for _ in range(BURST):
                    await seen.call("a request of the quota", self.stage.answer(limited, USED), right[USED])
            async with seen.streams(self.stage, client, right, *self.stage.names):
                sound = files.settings.read_text()
                for what, broken in BROKEN.items():
                    files.settings.write_text(broken(sound))
                    await self._refused(client, f"settings with {what}", right[USED])
                files.settings.write_text(sound)
                for file in (files.tokens, files.certificate, files.key):
                    whole = file.read_bytes()
                    file.write_bytes(b"\xff broken")
                    await self._refused(client, file.name, right[USED])
                    file.write_bytes(whole)
                begun_s = time.monotonic()
                files.settings.write_text(sound + _tenant("newcomer", NEWCOMER))
                await seen.call("sound settings", client.reload_config())
                async with self._client(NEWCOMER) as newcomer:
                    await seen.call("a new tenant", self.stage.answer(newcomer, USED), right[USED])
                recovered_s = time.monotonic() - begun_s
        return Outcome(saw=dict(seen.saw), recovered_s=recovered_s, problems=seen.problems)

    async def _refused(self, client: AsyncClient, what: str, right: Tokens) -> None:
        """By call, and by signal, of which nobody hears; then new connections find what was in force before."""
        await self.seen.refusal(what, client.reload_config())
        self.server.process.send_signal(signal.SIGHUP)
        async with self._client(OPERATOR) as operator:
            await self.seen.call(f"an old token after {what}", self.stage.answer(operator, USED), right)
        async with self._client(LIMITED) as limited:
            await self.seen.refusal(f"the quota after {what}", self.stage.answer(limited, USED))
        async with self._client(NEWCOMER) as newcomer:
            await self.seen.refusal(f"a token of nobody after {what}", self.stage.answer(newcomer, USED))

    def _client(self, token: str) -> AsyncClient:
        pem = self.files.folder / "authority.pem"
        pem.write_bytes(self.certificate)
        return AsyncClient(self.server.address, token=token, tls=ClientTls(root_certificates=pem))


def refused_at_start(stage: Stage) -> Outcome:
    """Each by one line and an exit code; and as it was before, all of it starts."""
    files = Files(stage.folder)
    files.write()
    problems = []
    refused = 0
    for file, broken in _broken(files):
        whole = file.read_bytes()
        file.write_bytes(broken)
        found = problems_of_start(stage.arguments(*files.arguments()), names=file.name)
        problems += found
        refused += not found
        file.write_bytes(whole)
    mended_s = time.monotonic()
    with stage.server(*files.arguments()) as server:
        recovered_s = asyncio.run(_answers(stage, server, files, mended_s))
    return Outcome(saw={"start refused": refused}, recovered_s=recovered_s, problems=problems)


def _broken(files: Files) -> list[tuple[Path, bytes]]:
    sound = files.settings.read_text()
    found = [(files.settings, broken(sound).encode()) for what, broken in BROKEN.items() if what == "no TOML"]
    return [*found, (files.tokens, b"short\n"), (files.certificate, b"\xff broken"), (files.key, b"")]


async def _answers(stage: Stage, server: LocalServer, files: Files, since_s: float) -> float:
    tls = ClientTls(root_certificates=files.certificate)
    async with AsyncClient(server.address, token=OPERATOR, tls=tls) as client:
        await stage.answers(client)
    return time.monotonic() - since_s


def _tenant(name: str, secret: str, burst: int = 0) -> str:
    limits = f"limits = {{ requests_per_s = 0.001, burst_s = {burst / RATE} }}\n" if burst else ""
    digest = hashlib.sha256(secret.encode()).hexdigest()
    return f'[tenants.{name}]\nadapters = ["*"]\n{limits}tokens = [{{ sha256 = "{digest}" }}]\n'


FAULTS = (
    Fault("settings-reloaded", "settings, tokens, certificate are broken when they are read again", reloaded),
    Fault("settings-at-start", "settings, tokens, certificate are broken at the start", refused_at_start),
)
