"""A replica as Ray Serve runs it: its life, its methods by their names, its health, its load, and who sends it what."""

from __future__ import annotations

import os
import random
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, aclosing
from typing import Any

from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig
from ray.serve.request_router import ReplicaID, RequestRouter, RunningReplica

from gralora_runtime.config import EngineConfig
from gralora_server.cli.environment import limit_spinning
from gralora_server.cli.logs import configure
from gralora_server.ports import Engine
from gralora_server.ray.affinity import plain
from gralora_server.ray.homes import UnderWay, order
from gralora_server.ray.plan import Plan
from gralora_server.ray.remote_log import RemoteLog
from gralora_server.ray.replica import Replica, Runner, serving
from gralora_server.ray.rpcs import Rpc, rpcs
from gralora_server.ray.scaling import REQUESTS, by_requests
from gralora_server.service import end_stuck, sparing_collector
from gralora_server.settings.layers import Layers

NAME = "gralora"
DEAD_EXIT_CODE = 1
EMPTY_LOOK_S = 0.5  # between two looks whether all has ended, when a replica stops


class GraloraReplica:
    """Its methods for gRPC are added by `application`."""

    async def __init__(self, layers: Layers) -> None:  # type: ignore[misc]  # Serve awaits it
        limit_spinning()
        server = layers.read().settings.server
        configure(server.log_level, server.log_format)
        context = serve.get_replica_context()
        self._life = AsyncExitStack()
        runner = Runner(
            name=context.replica_tag,
            log=RemoteLog(context.app_name),
            start_engine=_start_engine,
            give_up=end_stuck,
            end=_end,
        )
        with sparing_collector():
            self._replica: Replica = await self._life.enter_async_context(serving(layers, runner))

    def __serve_build_asgi_app__(self) -> Any:
        return self._replica.http

    async def check_health(self) -> None:
        self._replica.check()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        return {REQUESTS: float(self._replica.num_requests)}

    async def __del__(self) -> None:
        if hasattr(self, "_life"):  # it had begun
            await self._life.aclose()


class AdapterRouter(RequestRouter):  # type: ignore[misc]  # Ray's classes are untyped
    """Serve's proxies get a copy of this class, and import the rest."""

    def initialize_state(self) -> None:
        self._under_way = UnderWay()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: Any
    ) -> list[list[RunningReplica]]:
        """One after the other, for who names an adapter; for others the less busy one of any two."""
        # Serve empties this index only for routers that use it, and would keep every request for good.
        self._pending_requests_by_model_id.clear()
        pending_request.routing_context.should_backoff = True  # before it asks once more, if none takes the request
        adapter = plain(pending_request.metadata.multiplexed_model_id)
        if not adapter:
            return [random.sample(candidate_replicas, min(2, len(candidate_replicas)))]
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        names = order(adapter, self._under_way.loads(by_name))
        self._under_way.choose(pending_request.future, names[0])
        return [[by_name[name]] for name in names]

    def on_send_request(self, replica_id: ReplicaID) -> None:
        super().on_send_request(replica_id)
        self._under_way.send(replica_id.unique_id)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        super().on_request_completed(replica_id, internal_request_id)
        self._under_way.end(replica_id.unique_id)


def application(plan: Plan) -> serve.Application:
    """For Serve to run."""
    methods = {name: _method(rpc) for name, rpc in rpcs(kserve=plan.settings.server.kserve).items()}
    kind = type("Gralora", (GraloraReplica,), {**methods, "__doc__": GraloraReplica.__doc__})
    replicas = plan.replicas
    options: dict[str, Any] = {"num_replicas": replicas.number}
    if replicas.most is not None:
        options = {"autoscaling_config": _autoscaling(plan)}
    deployment = serve.deployment(serve.ingress()(kind)).options(
        name=NAME,
        max_ongoing_requests=plan.max_calls,
        graceful_shutdown_timeout_s=plan.settings.server.grace_s,
        graceful_shutdown_wait_loop_s=EMPTY_LOOK_S,
        max_surge_percent=replicas.surge_percent,
        request_router_config=RequestRouterConfig(request_router_class=AdapterRouter),
        ray_actor_options={"num_cpus": replicas.cpus, "num_gpus": replicas.gpus},
        **options,
    )
    made: serve.Application = deployment.bind(plan.layers)
    return made


def _method(rpc: Rpc) -> Callable[..., Any]:
    async def answer(self: Any, request: Any, grpc_context: Any) -> Any:
        return await self._replica.grpc.answer(rpc.path, request, grpc_context)

    async def stream(self: Any, request: Any, grpc_context: Any) -> AsyncIterator[Any]:
        async with aclosing(self._replica.grpc.messages(rpc.path, request, grpc_context)) as messages:
            async for message in messages:
                yield message

    return stream if rpc.streams else answer


def _autoscaling(plan: Plan) -> AutoscalingConfig:
    replicas = plan.replicas
    return AutoscalingConfig(
        min_replicas=replicas.number,
        max_replicas=replicas.most,
        target_ongoing_requests=replicas.requests,
        policy=AutoscalingPolicy(policy_function=f"{by_requests.__module__}:{by_requests.__name__}"),
    )


async def _start_engine(config: EngineConfig) -> Engine:
    from gralora_runtime.async_engine import AsyncEngine

    return await AsyncEngine.start(config)


def _end() -> None:
    os._exit(DEAD_EXIT_CODE)
