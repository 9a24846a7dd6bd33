"""The server's life: bind, load, serve, drain, stop. Knows neither argv nor what an engine is made of."""

from __future__ import annotations

import asyncio
import faulthandler
import gc
import logging
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from typing import Any, TypeVar

import grpc
from grpc_reflection.v1alpha import reflection

from gralora_runtime.errors import ConfigError, EngineDeadError, GraloraError
from gralora_server.config import MetricsConfig, ServerConfig
from gralora_server.errors import ConfigInvalidError, StartingError
from gralora_server.interceptors import AuthInterceptor, CallInterceptor
from gralora_server.metrics.page import MetricsPage
from gralora_server.parts import FAREWELL_S, Parts
from gralora_server.ports import Engine, EngineFactory
from gralora_server.settings.reloader import Reloader
from gralora_server.tenants.keeping import keeping
from gralora_server.tls import ServerCertificate

HEALTH_SERVICE = "grpc.health.v1.Health"
# Calls that have arrived and that Python has not looked at yet. By default gRPC ends some of those beyond 1,000, and
# all beyond 3,000, as CANCELLED, which tells a client nothing: of 1,500 streams opened at once 40 to 60 ended so.
MAX_PENDING_CALLS = 10_000
STUCK_EXIT_CODE = 134  # as a shell shows an abort
STDIN = 0
# New objects until the collector looks at them, while a server starts. Never to look gains no more, and holds 130 MB of
# what compiling kernels leaves.
STARTING_COLLECTS_AT = 10_000

_log = logging.getLogger(__name__)

T = TypeVar("T")


class GrpcServer(Parts):
    """The parts behind a port. Answers from `start` on: with UNAVAILABLE until `open`, and again from `drain` on."""

    def __init__(
        self,
        config: ServerConfig,
        reloader: Reloader | None = None,
        absent: Callable[[], GraloraError] = StartingError,
    ) -> None:
        """`absent`: see `Gate`."""
        super().__init__(config, reloader, absent)
        interceptors: list[grpc.aio.ServerInterceptor[Any, Any]] = [AuthInterceptor(self.tenancy), CallInterceptor()]
        self._server = grpc.aio.server(interceptors=interceptors, options=_channel_options(config))
        self.add_to(self._server)
        if config.reflection:
            names = (*self.services, HEALTH_SERVICE, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, self._server)

    async def start(self) -> int:
        """Bind and answer. Returns the port, which the system chose if the configuration says 0."""
        address = f"{self._config.host}:{self._config.port}"
        try:
            if self._config.tls is None:
                port = self._server.add_insecure_port(address)
            else:
                certificate = ServerCertificate(self._config.tls)
                self.reloader.add(certificate)
                port = self._server.add_secure_port(address, certificate.credentials())
        except RuntimeError as cause:
            raise ConfigError(f"cannot listen on {address}: {cause}") from cause
        await self._server.start()
        return port

    async def stop(self) -> None:
        """Close the port and every connection."""
        await self.close()
        await self._server.stop(grace=FAREWELL_S)


async def serve(
    config: ServerConfig,
    engine_factory: EngineFactory,
    *,
    reloader: Reloader | None = None,
    on_bound: Callable[[int], None] | None = None,
    on_serving: Callable[[int], None] | None = None,
    on_metrics: Callable[[int], None] | None = None,
    on_http: Callable[[int], None] | None = None,
    on_ui: Callable[[int], None] | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT, then drain; a second signal ends the draining at once. SIGHUP reloads the
    configuration file, if there is one.

    `on_bound` is told the port when calls are answered, if only with UNAVAILABLE; `on_serving` when requests are taken.
    `on_metrics` is told the port of the metrics page, which is there from before the model loads until the very end,
    `on_http` that for OpenAI's clients, and `on_ui` that of the live page, which is there as long as the other page.

    Raises what the factory raises, and `EngineDeadError` when the engine died while serving.
    """
    server = GrpcServer(config, reloader)
    port = await server.start()
    try:
        async with (
            keeping(server.usage, config.state_dir),
            _page(config.metrics, server) as metrics_port,
            serving_http(config, server) as http_port,
            _live_page(config, server) as ui_port,
        ):
            for tell, page_port in ((on_metrics, metrics_port), (on_http, http_port), (on_ui, ui_port)):
                if tell is not None and page_port is not None:
                    tell(page_port)
            if on_bound is not None:
                on_bound(port)
            _log.info("listening on %s:%d", config.host, port)
            await _load_and_serve(server, engine_factory, config, partial(on_serving or _quietly, port))
    finally:
        await server.stop()


async def _load_and_serve(
    server: GrpcServer, engine_factory: EngineFactory, config: ServerConfig, announce: Callable[[], None]
) -> None:
    with _signals(server, supervised=config.supervised) as asked_to_stop:
        with sparing_collector():
            engine = await _unless(asked_to_stop, engine_factory())
        if engine is None:
            return
        with server.watched(engine, give_up=end_stuck if config.supervised else None):
            try:
                await server.open(engine)
                announce()
                await _serve_engine(server, engine, asked_to_stop, config.drain_grace_s)
            finally:
                await engine.close()


@contextmanager
def sparing_collector() -> Iterator[None]:
    """While that is made which stays until the process ends, look for garbage less often: each look passes over all of
    it, 1.2 of a start's 6 s. Afterwards never look at it again: that takes 200 ms, in which no stream gets a token.
    """
    usual = gc.get_threshold()
    gc.set_threshold(STARTING_COLLECTS_AT, *usual[1:])
    try:
        yield
    finally:
        gc.set_threshold(*usual)
    gc.collect()
    gc.freeze()


def _quietly(_port: int) -> None:
    """For those who do not want to be told."""


@asynccontextmanager
async def _page(config: MetricsConfig | None, server: GrpcServer) -> AsyncIterator[int | None]:
    """The port of the metrics page while it is served; None if it is not wanted."""
    if config is None:
        yield None
        return
    page = await asyncio.to_thread(MetricsPage, config, server.gate, server.usage)
    _log.info("metrics on http://%s:%d/metrics", config.host, page.port)
    try:
        yield page.port
    finally:
        await asyncio.to_thread(page.close)


@asynccontextmanager
async def serving_http(config: ServerConfig, server: GrpcServer) -> AsyncIterator[int | None]:
    """The port for OpenAI's clients while it is served; None if it is not wanted."""
    if config.http is None:
        yield None
        return
    from gralora_server.http.front import http_listener  # its libraries take a tenth of a second

    listener = http_listener(config.http, config, server)
    port = await listener.start()
    _log.info("HTTP on %s:%d", config.http.host, port)
    try:
        yield port
    finally:
        await listener.stop()


@asynccontextmanager
async def _live_page(config: ServerConfig, server: GrpcServer) -> AsyncIterator[int | None]:
    """The port of the live page while it is served; None if it is not wanted."""
    if config.ui is None:
        yield None
        return
    from gralora_server.live.page import LivePage  # as above

    page = await asyncio.to_thread(LivePage, config.ui, config, server)
    _log.info("live page on http://%s:%d", config.ui.host, page.port)
    try:
        yield page.port
    finally:
        await asyncio.to_thread(page.close)


async def _serve_engine(server: GrpcServer, engine: Engine, asked_to_stop: asyncio.Event, grace_s: float) -> None:
    _log.info("ready")
    if await _unless(engine.dead, asked_to_stop.wait()) is None:
        _log.critical("the engine died; stopping")
        await server.fail()
        raise EngineDeadError
    _log.info("draining for at most %g s", grace_s)
    await server.drain(grace_s)
    if engine.dead.is_set():
        raise EngineDeadError


async def _unless(event: asyncio.Event, work: Awaitable[T]) -> T | None:
    """The result of `work`, or None if the event came first: the work is then cancelled."""
    task = asyncio.ensure_future(work)
    interruption = asyncio.ensure_future(event.wait())
    try:
        await asyncio.wait({task, interruption}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        interruption.cancel()
        task.cancel()


def end_stuck() -> None:
    """End this process as an abort would, with all its stacks on standard error, and without its core in a file."""
    _log.critical("the step does not end: this process does, with exit code %d", STUCK_EXIT_CODE)
    faulthandler.dump_traceback(all_threads=True)
    os._exit(STUCK_EXIT_CODE)


@contextmanager
def _signals(server: GrpcServer, *, supervised: bool) -> Iterator[asyncio.Event]:
    """The event is set by the first SIGTERM or SIGINT; any further one ends what still runs. The end of standard input
    is the supervisor's, whose port nobody would keep.
    """
    loop, asked_to_stop = asyncio.get_running_loop(), asyncio.Event()
    reloads: set[asyncio.Task[None]] = set()

    def on_signal() -> None:
        if asked_to_stop.is_set():
            server.expel()
        asked_to_stop.set()

    def on_hangup() -> None:
        task = loop.create_task(_reload(server.reloader))
        reloads.add(task)  # the loop itself would forget it
        task.add_done_callback(reloads.discard)

    def on_input() -> None:
        if not os.read(STDIN, 1):
            loop.remove_reader(STDIN)
            on_signal()

    handlers = dict.fromkeys((signal.SIGTERM, signal.SIGINT), on_signal)
    if server.reloader.has_file:  # otherwise a terminal that is closed ends its server, as it always did
        handlers[signal.SIGHUP] = on_hangup
    for number, handler in handlers.items():
        loop.add_signal_handler(number, handler)
    if supervised:
        loop.add_reader(STDIN, on_input)
    try:
        yield asked_to_stop
    finally:
        if supervised:
            loop.remove_reader(STDIN)
        for number in handlers:
            loop.remove_signal_handler(number)


async def _reload(reloader: Reloader) -> None:
    with suppress(ConfigInvalidError):  # it is in the log
        await reloader.reload()


def _channel_options(config: ServerConfig) -> list[tuple[str, int]]:
    options = [
        ("grpc.max_receive_message_length", config.max_message_bytes),
        ("grpc.server.max_pending_requests", MAX_PENDING_CALLS),
        ("grpc.server.max_pending_requests_hard_limit", MAX_PENDING_CALLS),
        # Two servers on one port would share its connections silently; supervisor and supervised mean to.
        ("grpc.so_reuseport", int(config.supervised)),
        ("grpc.keepalive_time_ms", 20_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        # The keepalive's own limit is one for TCP, and a frozen process's system acknowledges what it is sent.
        ("grpc.http2.ping_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        # A client that pings during a long silent prefill must not be taken for an attacker.
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ]
    if config.max_connection_age_s is not None:
        options.append(("grpc.max_connection_age_ms", int(config.max_connection_age_s * 1000)))
    return options
