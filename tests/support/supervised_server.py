"""What a supervisor's tests run as its child: the real service over a fake engine, living as a test has planned."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from support.fake_engine import FakeEngine, finished

from gralora_server.config import HttpConfig, ServerConfig, TlsConfig
from gralora_server.service import serve

HOPELESS = 2
STEP_TIMEOUT_S = 0.4
PROGRAM = """
import sys
sys.path[:0] = {path!r}
from support.supervised_server import live
live({port}, {http!r}, {folder!r}, {lives!r}, {tls!r})
"""


class BusyEngine(FakeEngine):
    """One short step after the other."""

    @property
    def busy_since_s(self) -> float | None:
        return time.monotonic() // 0.1 * 0.1

    @busy_since_s.setter
    def busy_since_s(self, _: float | None) -> None: ...


def command(ports: ServerConfig, folder: Path, *, lives: Sequence[str] = ("serve",)) -> list[str]:
    """`ports`: and their files. `lives`: one for each process, and the last is that of all further ones.

    Those that serve are "serve", "serve-deaf" to SIGHUP, "serve-busily" and "stick" in a step; before that, one may
    "refuse" its settings or "crash".
    """
    tls = ports.tls and (str(ports.tls.certificate), str(ports.tls.private_key), str(ports.tls.client_ca))
    http = ports.http and ports.http.port
    program = PROGRAM.format(path=sys.path, port=ports.port, http=http, folder=str(folder), lives=tuple(lives), tls=tls)
    return [sys.executable, "-c", program]


def live(port: int, http: int | None, folder: str, lives: Sequence[str], tls: tuple[str, str, str] | None) -> None:
    """Prints "serving PID" when it serves, and "hup" when it is asked to read its files again."""
    starts = Path(folder) / "starts"
    number = len(starts.read_text()) if starts.exists() else 0
    starts.write_text("x" * (number + 1))
    life = lives[min(number, len(lives) - 1)]
    if life in ("refuse", "crash"):
        sys.exit(HOPELESS if life == "refuse" else 3)
    config = ServerConfig(
        port=port,
        http=None if http is None else HttpConfig(host="127.0.0.1", port=http),
        supervised=True,
        step_timeout_s=STEP_TIMEOUT_S,
        tls=TlsConfig(certificate=Path(tls[0]), private_key=Path(tls[1]), client_ca=Path(tls[2])) if tls else None,
    )
    asyncio.run(_serve(config, life))


async def _serve(config: ServerConfig, life: str) -> None:
    async def start() -> FakeEngine:
        engine = BusyEngine() if life == "serve-busily" else FakeEngine()
        engine.script = [finished()]
        engine.busy_since_s = time.monotonic() if life == "stick" else None
        return engine

    if life != "serve-deaf":
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, lambda: print("hup", flush=True))
    await serve(config, start, on_serving=lambda _: print(f"serving {os.getpid()}", flush=True))
