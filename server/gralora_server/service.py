"""The server's life: bind, load, serve, drain, stop. Knows neither argv nor what an engine is made of."""

from __future__ import annotations

import asyncio
import faulthandler
import gc
import logging
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager, suppress
from functools import partial
from typing import Any, TypeVar

import grpc
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from gralora.v1 import (
    adapters_pb2,
    adapters_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    server_pb2,
    server_pb2_grpc,
)
from gralora_runtime.errors import ConfigError, DrainingError, EngineDeadError, GraloraError
from gralora_server.config import MetricsConfig, ServerConfig
from gralora_server.errors import ConfigInvalidError, StartingError
from gralora_server.gate import Gate, Phase
from gralora_server.generating import Generating
from gralora_server.health import Health
from gralora_server.interceptors import AuthInterceptor, CallInterceptor
from gralora_server.kserve.naming import SERVICE as KSERVE_SERVICE
from gralora_server.metrics.page import MetricsPage
from gralora_server.objectives import Objectives
from gralora_server.ports import Engine, EngineFactory
from gralora_server.servicers import AdapterServicer, GenerationServicer, ServerServicer
from gralora_server.settings.layers import NOTHING_SAID
from gralora_server.settings.reloader import Reloader
from gralora_server.tenants.keeping import keeping
from gralora_server.tenants.metering import Metering
from gralora_server.tenants.quotas import Quotas
from gralora_server.tenants.rights import Rights
from gralora_server.tenants.tenancy import Tenancy
from gralora_server.tenants.usage import Usage
from gralora_server.tls import ServerCertificate
from gralora_server.vllm_grpc.naming import SERVICES as VLLM_SERVICES
from gralora_server.watchdog import watching

SERVICES = tuple(
    file.DESCRIPTOR.services_by_name[name].full_name
    for file, name in (
        (generation_pb2, "GenerationService"),
        (adapters_pb2, "AdapterService"),
        (server_pb2, "ServerService"),
    )
)
HEALTH_SERVICE = "grpc.health.v1.Health"
FAREWELL_S = 2.0  # for statuses to reach clients that read
# Calls that have arrived and that Python has not looked at yet. By default gRPC ends some of those beyond 1,000, and
# all beyond 3,000, as CANCELLED, which tells a client nothing: of 1,500 streams opened at once 40 to 60 ended so.
MAX_PENDING_CALLS = 10_000
STUCK_EXIT_CODE = 134  # as a shell shows an abort
STDIN = 0

_log = logging.getLogger(__name__)

T = TypeVar("T")


class GrpcServer:
    """Answers from `start` on: with UNAVAILABLE until `open`, and again from `drain` on."""

    def __init__(
        self,
        config: ServerConfig,
        reloader: Reloader | None = None,
        absent: Callable[[], GraloraError] = StartingError,
    ) -> None:
        """`absent`: see `Gate`."""
        self._config = config
        self.reloader = reloader if reloader is not None else Reloader(NOTHING_SAID.read)
        self.gate = Gate(absent)
        self._objectives = Objectives(self.gate)
        self.reloader.add(self._objectives)
        self.quotas = Quotas()
        self.usage = Usage()
        foreign = (*((KSERVE_SERVICE,) if config.kserve else ()), *(VLLM_SERVICES if config.vllm_grpc else ()))
        self._services = (*SERVICES, *foreign)
        self._health = Health(self._services)
        self.tenancy = Tenancy(
            config.tenancy or self.reloader.settings,
            token_file=config.auth_token_file,
            asks_for_certificates=config.tls is not None and config.tls.client_ca is not None,
        )
        self.reloader.add(self.tenancy)
        self.quotas.prepare(self.tenancy.current.settings)()
        self.reloader.add(self.quotas)
        interceptors: list[grpc.aio.ServerInterceptor[Any, Any]] = [AuthInterceptor(self.tenancy), CallInterceptor()]
        self._server = grpc.aio.server(interceptors=interceptors, options=_channel_options(config))
        self._register()

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

    async def open(self, engine: Engine) -> None:
        """Take requests."""
        self._objectives.inform(engine)
        engine.adapters.limit_pool(self.quotas.share_of_pool)
        self.gate.open(engine)
        await self._health.set_serving(True)

    async def set_stuck(self, stuck: bool) -> None:
        """A step of the engine takes too long, or has ended after all."""
        self.gate.stuck = stuck
        if self.gate.phase is Phase.SERVING:
            await self._health.set_serving(not stuck)

    async def drain(self, grace_s: float) -> None:
        """Take no new work, let what runs finish, and end what is left after `grace_s` with a status that says so."""
        await self._health.set_serving(False)
        self.gate.begin_drain()
        if not await self.gate.wait_empty(grace_s):
            self.expel()
            await self.gate.wait_empty(FAREWELL_S)

    def expel(self) -> None:
        """End what runs at once; a drain that waits for it is then over."""
        self.gate.evict(DrainingError())

    async def fail(self) -> None:
        """The engine is dead: it has failed its streams itself, and their statuses only need to get out."""
        await self._health.set_serving(False)
        self.gate.declare_dead()
        await self.gate.wait_empty(FAREWELL_S)

    async def stop(self) -> None:
        """Close the port and every connection."""
        await self._health.close()
        await self._server.stop(grace=FAREWELL_S)

    def _register(self) -> None:
        rights, metering = Rights(self.tenancy), Metering(self.quotas, self.usage)
        self.generating = Generating(self.gate, rights, metering, max_request_s=self._config.max_request_s)
        generation = GenerationServicer(self.generating, write_timeout_s=self._config.write_timeout_s)
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(generation, self._server)
        self.adapters = AdapterServicer(self.gate, rights, metering)
        adapters_pb2_grpc.add_AdapterServiceServicer_to_server(self.adapters, self._server)
        self.about = ServerServicer(self.gate, rights, self.reloader, self.usage)
        server_pb2_grpc.add_ServerServiceServicer_to_server(self.about, self._server)
        if self._config.kserve:
            self._register_kserve(rights)
        if self._config.vllm_grpc:
            self._register_vllm()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        if self._config.reflection:
            names = (*self._services, HEALTH_SERVICE, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, self._server)

    def _register_kserve(self, rights: Rights) -> None:
        # Its messages have the names that tritonclient's have, and a process can have only one of both.
        from gralora.foreign import kserve_pb2_grpc
        from gralora_server.kserve.servicer import KServeServicer

        kserve = KServeServicer(
            self.gate, self.generating, self.adapters, rights, write_timeout_s=self._config.write_timeout_s
        )
        kserve_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(kserve, self._server)

    def _register_vllm(self) -> None:
        from gralora.foreign import vllm_pb2_grpc  # as above: a process may have stubs of vLLM's own
        from gralora_server.vllm_grpc.control import VllmControl
        from gralora_server.vllm_grpc.inference import VllmInference

        inference = VllmInference(self.gate, self.generating, write_timeout_s=self._config.write_timeout_s)
        vllm_pb2_grpc.add_InferenceServicer_to_server(inference, self._server)
        control = VllmControl(self.gate, self.adapters, self.about, model_dir=self._config.model_dir)
        vllm_pb2_grpc.add_ControlServicer_to_server(control, self._server)


async def serve(
    config: ServerConfig,
    engine_factory: EngineFactory,
    *,
    reloader: Reloader | None = None,
    on_bound: Callable[[int], None] | None = None,
    on_serving: Callable[[int], None] | None = None,
    on_metrics: Callable[[int], None] | None = None,
    on_http: Callable[[int], None] | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT, then drain; a second signal ends the draining at once. SIGHUP reloads the
    configuration file, if there is one.

    `on_bound` is told the port when calls are answered, if only with UNAVAILABLE; `on_serving` when requests are taken.
    `on_metrics` is told the port of the metrics page, which is there from before the model loads until the very end,
    and `on_http` that for OpenAI's clients.

    Raises what the factory raises, and `EngineDeadError` when the engine died while serving.
    """
    server = GrpcServer(config, reloader)
    port = await server.start()
    try:
        async with (
            keeping(server.usage, config.state_dir),
            _page(config.metrics, server) as metrics_port,
            serving_http(config, server) as http_port,
        ):
            if metrics_port is not None and on_metrics is not None:
                on_metrics(metrics_port)
            if http_port is not None and on_http is not None:
                on_http(http_port)
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
        engine = await _unless(asked_to_stop, engine_factory())
        if engine is None:
            return
        with _watchdog(server, engine, config):
            try:
                spare_collector()
                await server.open(engine)
                announce()
                await _serve_engine(server, engine, asked_to_stop, config.drain_grace_s)
            finally:
                await engine.close()


def spare_collector() -> None:
    """Let Python's garbage collector pass over all that was made until now, which stays: looking through a model's
    libraries takes it 200 ms, in which no stream gets a token. For a process that serves until its end.
    """
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

    listener = http_listener(
        config.http,
        config,
        gate=server.gate,
        tenancy=server.tenancy,
        generating=server.generating,
        adapters=server.adapters,
        server=server.about,
    )
    port = await listener.start()
    _log.info("HTTP on %s:%d", config.http.host, port)
    try:
        yield port
    finally:
        await listener.stop()


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


def _watchdog(server: GrpcServer, engine: Engine, config: ServerConfig) -> AbstractContextManager[None]:
    """Health and new requests learn of a stuck engine; a supervised process ends, so that another takes its place."""
    loop = asyncio.get_running_loop()

    def on_change(stuck: bool) -> None:
        _log.log(
            logging.CRITICAL if stuck else logging.WARNING,
            "a step has taken more than %g s: %s",
            config.step_timeout_s,
            "no requests are taken until it ends" if stuck else "it has ended, and requests are taken again",
        )
        asyncio.run_coroutine_threadsafe(server.set_stuck(stuck), loop)

    return watching(
        lambda: engine.busy_since_s,
        limit_s=config.step_timeout_s,
        on_change=on_change,
        give_up=end_stuck if config.supervised else None,
    )


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
