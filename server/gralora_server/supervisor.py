"""Keeps a server up: runs it in a child, starts another when it ends, and answers in between. Knows no engine.

The ports are never closed for long. Parent and child both may listen on them (SO_REUSEPORT): the parent from before
the first child until one serves, and again from when that one ends. It answers as a server does that is starting.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace

from gralora_runtime.errors import ConfigError
from gralora_server.config import ServerConfig
from gralora_server.errors import RestartingError, StartingError
from gralora_server.settings.reloader import Reloader
from gralora_server.stand_in import StandIn

FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 60.0
STEADY_S = 60.0  # who served for so long did not end because of how it began
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

_log = logging.getLogger(__name__)


class Backoff:
    """How long to wait before the next child: 1, 2, 4 ... 60 s, and 1 again after one that served for a minute."""

    def __init__(self) -> None:
        self._next_s = FIRST_PAUSE_S

    def pause_s(self, served_s: float) -> float:
        """`served_s`: for how long the child that ended has served."""
        if served_s >= STEADY_S:
            self._next_s = FIRST_PAUSE_S
        pause_s, self._next_s = self._next_s, min(2 * self._next_s, LONGEST_PAUSE_S)
        return pause_s


async def supervise(
    config: ServerConfig,
    command: Callable[[ServerConfig], Sequence[str]],
    *,
    settings: Callable[[], Reloader | None],
    say: Callable[[str], None],
    hopeless: int,
    backoff: Backoff | None = None,
) -> int:
    """Until SIGTERM or SIGINT, which the child gets. Returns the exit code of the last child.

    `command` is told the ports, and starts a server that prints a line when it serves; each goes to `say`. `settings`
    says who may call it. `hopeless` is the exit code of one whose settings cannot work: before any has served, that is
    the end.

    Raises `ConfigError` if a port is in use.
    """
    with ExitStack() as reserved:
        port = reserved.enter_context(_reserved(config.host, config.port))
        http = config.http
        if http is not None:
            http = replace(http, port=reserved.enter_context(_reserved(http.host, http.port)))
        shared = replace(config, port=port, http=http, supervised=True, metrics=None)
        supervisor = _Supervisor(
            shared,
            command=command(shared),
            settings=settings,
            say=say,
            hopeless=hopeless,
            backoff=backoff or Backoff(),
        )
        return await supervisor.run()


@contextmanager
def _reserved(host: str, port: int) -> Iterator[int]:
    """The port, chosen if it is 0, and ours for as long as the block lasts, whoever listens on it.

    Servers that share a port on purpose also share it by mistake, so at first it is asked for like any other.
    """
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(
            host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as alone:
            alone.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of the past do not count
            alone.bind(where)
            where = alone.getsockname()
        with socket.socket(family, kind, protocol) as shared:
            shared.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            shared.bind(where)  # and never listens
            yield int(where[1])
    except OSError as cause:
        raise ConfigError(f"cannot listen on {host}:{port}: {cause}") from cause


class _Supervisor:
    def __init__(
        self,
        config: ServerConfig,
        *,
        command: Sequence[str],
        settings: Callable[[], Reloader | None],
        say: Callable[[str], None],
        hopeless: int,
        backoff: Backoff,
    ) -> None:
        self._config = config
        self._command = command
        self._settings = settings
        self._say = say
        self._hopeless = hopeless
        self._backoff = backoff
        self._child: asyncio.subprocess.Process | None = None
        self._serving_since_s: float | None = None  # the child
        self._has_served = False  # any child
        self._asked_to_stop = asyncio.Event()
        self._stand_in: StandIn | None = None

    async def run(self) -> int:
        with self._signals():
            try:
                return await self._keep_up()
            finally:
                await self._stand_down()

    async def _keep_up(self) -> int:
        while True:
            await self._stand_in_for_child()
            code = await self._life()
            served_s = 0.0 if self._serving_since_s is None else time.monotonic() - self._serving_since_s
            # Without a file to read again, SIGHUP is a terminal that is closed, and ends a server.
            if self._asked_to_stop.is_set() or -code == signal.SIGHUP:
                return 0 if -code in SIGNALS else _as_shown(code)  # it may not have been far enough to mind a signal
            if code == 0 or (code == self._hopeless and not self._has_served):
                return code
            await self._stand_in_for_child()
            pause_s = self._backoff.pause_s(served_s)
            _log.error("the server ended with exit code %d; the next one starts in %g s", _as_shown(code), pause_s)
            if await self._stopped_within(pause_s):
                return 0

    async def _life(self) -> int:
        """Of one child. Its exit code, or minus the signal that ended it."""
        self._serving_since_s = None
        # A session of its own: Ctrl-C is ours to hand on, once.
        self._child = child = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
        _log.info("the server runs as process %d", child.pid)
        if self._asked_to_stop.is_set():  # just now
            child.terminate()
        assert child.stdout is not None
        listening = asyncio.ensure_future(self._listen_to(child.stdout))
        try:
            return await child.wait()
        finally:
            self._child = None
            listening.cancel()
            (failed,) = await asyncio.gather(listening, return_exceptions=True)
            if isinstance(failed, Exception):
                _log.error("what the server said could not be passed on", exc_info=failed)

    async def _listen_to(self, stdout: asyncio.StreamReader) -> None:
        while line := await stdout.readline():
            self._serving_since_s, self._has_served = time.monotonic(), True
            await self._stand_down()
            self._say(line.decode().rstrip("\n"))

    async def _stand_in_for_child(self) -> None:
        if self._stand_in is not None:
            return
        absent = RestartingError if self._has_served else StartingError
        try:
            stand_in = StandIn(self._config, self._settings(), absent)
            await stand_in.start()
        except ConfigError:
            if not self._has_served:
                raise
            _log.exception("nobody answers until the next server does")  # and that one may find its files mended
        else:
            self._stand_in = stand_in

    async def _stand_down(self) -> None:
        stand_in, self._stand_in = self._stand_in, None
        if stand_in is not None:
            await stand_in.stop()

    async def _stopped_within(self, pause_s: float) -> bool:
        try:
            await asyncio.wait_for(self._asked_to_stop.wait(), pause_s)
        except TimeoutError:
            return False
        return True

    @contextmanager
    def _signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(number, self._on_signal, number)
        try:
            yield
        finally:
            for number in SIGNALS:
                loop.remove_signal_handler(number)

    def _on_signal(self, number: signal.Signals) -> None:
        if number is signal.SIGHUP and self._serving_since_s is None:
            return  # whoever starts reads everything anyway, and would not expect it yet
        if number is not signal.SIGHUP:
            self._asked_to_stop.set()
        if self._child is not None:
            with suppress(ProcessLookupError):  # it has ended, which we are about to hear
                self._child.send_signal(number)


def _as_shown(code: int) -> int:
    """As a shell shows it."""
    return code if code >= 0 else 128 - code
