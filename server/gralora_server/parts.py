"""What answers calls, made once for a server, and its life: from opening to draining. Has no port of its own."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from grpc_health.v1 import health_pb2_grpc

from gralora.v1 import (
    adapters_pb2,
    adapters_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    server_pb2,
    server_pb2_grpc,
)
from gralora_runtime.errors import DrainingError, GraloraError
from gralora_server.config import ServerConfig
from gralora_server.errors import StartingError
from gralora_server.gate import Gate, Phase
from gralora_server.generating import Generating
from gralora_server.health import Health
from gralora_server.kserve.naming import SERVICE as KSERVE_SERVICE
from gralora_server.objectives import Objectives
from gralora_server.ports import Engine
from gralora_server.servicers import AdapterServicer, GenerationServicer, ServerServicer
from gralora_server.settings.layers import NOTHING_SAID
from gralora_server.settings.reloader import Reloader
from gralora_server.tenants.metering import Metering
from gralora_server.tenants.quotas import Quotas
from gralora_server.tenants.rights import Rights
from gralora_server.tenants.tenancy import Tenancy
from gralora_server.tenants.usage import Usage
from gralora_server.tracing.tracing import tracing
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
FAREWELL_S = 2.0  # for statuses to reach clients that read

_log = logging.getLogger(__name__)

MakeAdapters = Callable[[Gate, Rights, Metering], AdapterServicer]
MakeAbout = Callable[[Gate, Rights, Reloader, Usage], ServerServicer]


class Parts:
    """Refuses with UNAVAILABLE until `open`, and again from `drain` on."""

    def __init__(
        self,
        config: ServerConfig,
        reloader: Reloader | None = None,
        absent: Callable[[], GraloraError] = StartingError,
        *,
        adapters: MakeAdapters = AdapterServicer,
        about: MakeAbout = ServerServicer,
    ) -> None:
        """`absent`: see `Gate`. `adapters` and `about`: for a server that is not alone."""
        self._config = config
        self.reloader = reloader if reloader is not None else Reloader(NOTHING_SAID.read)
        self.gate = Gate(absent)
        self._objectives = Objectives(self.gate)
        self.reloader.add(self._objectives)
        self.quotas = Quotas()
        self.usage = Usage()
        foreign = (*((KSERVE_SERVICE,) if config.kserve else ()), *(VLLM_SERVICES if config.vllm_grpc else ()))
        self.services = (*SERVICES, *foreign)
        self._health = Health(self.services)
        self.tenancy = Tenancy(
            config.tenancy or self.reloader.settings,
            token_file=config.auth_token_file,
            asks_for_certificates=config.tls is not None and config.tls.client_ca is not None,
        )
        self.reloader.add(self.tenancy)
        self.quotas.prepare(self.tenancy.current.settings)()
        self.reloader.add(self.quotas)
        self._rights, metering = Rights(self.tenancy), Metering(self.quotas, self.usage)
        self._tracing = tracing(config.tracing)
        self.generating = Generating(
            self.gate, self._rights, metering, max_request_s=config.max_request_s, tracing=self._tracing
        )
        self.adapters = adapters(self.gate, self._rights, metering)
        self.about = about(self.gate, self._rights, self.reloader, self.usage)

    def add_to(self, server: Any) -> None:
        """Let a server of gRPC, or what has its methods for handlers, serve all services."""
        generation = GenerationServicer(self.generating, write_timeout_s=self._config.write_timeout_s)
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(generation, server)
        adapters_pb2_grpc.add_AdapterServiceServicer_to_server(self.adapters, server)
        server_pb2_grpc.add_ServerServiceServicer_to_server(self.about, server)
        if self._config.kserve:
            self._add_kserve_to(server)
        if self._config.vllm_grpc:
            self._add_vllm_to(server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)

    def watched(self, engine: Engine, *, give_up: Callable[[], None] | None = None) -> AbstractContextManager[None]:
        """While the block lasts, health and new requests learn of a stuck engine. `give_up`: see `watching`."""
        loop, limit_s = asyncio.get_running_loop(), self._config.step_timeout_s

        def on_change(stuck: bool) -> None:
            _log.log(
                logging.CRITICAL if stuck else logging.WARNING,
                "a step has taken more than %g s: %s",
                limit_s,
                "no requests are taken until it ends" if stuck else "it has ended, and requests are taken again",
            )
            asyncio.run_coroutine_threadsafe(self.set_stuck(stuck), loop)

        return watching(lambda: engine.busy_since_s, limit_s=limit_s, on_change=on_change, give_up=give_up)

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

    async def close(self) -> None:
        """End all that watches health, which would otherwise hold up a server's stop; the last traces get out."""
        await self._health.close()
        await asyncio.to_thread(self._tracing.close)

    def _add_kserve_to(self, server: Any) -> None:
        # Its messages have the names that tritonclient's have, and a process can have only one of both.
        from gralora.foreign import kserve_pb2_grpc
        from gralora_server.kserve.servicer import KServeServicer

        kserve = KServeServicer(
            self.gate, self.generating, self.adapters, self._rights, write_timeout_s=self._config.write_timeout_s
        )
        kserve_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(kserve, server)

    def _add_vllm_to(self, server: Any) -> None:
        from gralora.foreign import vllm_pb2_grpc  # as above: a process may have stubs of vLLM's own
        from gralora_server.vllm_grpc.control import VllmControl
        from gralora_server.vllm_grpc.inference import VllmInference

        inference = VllmInference(self.gate, self.generating, write_timeout_s=self._config.write_timeout_s)
        vllm_pb2_grpc.add_InferenceServicer_to_server(inference, server)
        control = VllmControl(self.gate, self.adapters, self.about, model_dir=self._config.model_dir)
        vllm_pb2_grpc.add_ControlServicer_to_server(control, server)
