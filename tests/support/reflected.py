"""What a server tells of itself by gRPC's reflection."""

from __future__ import annotations

from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from support.grpc_harness import Served


async def reflected(s: Served) -> set[str]:
    """The services that it tells of."""
    call = reflection_pb2_grpc.ServerReflectionStub(s.client.channel).ServerReflectionInfo()
    await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
    answer = await call.read()
    call.cancel()
    return {service.name for service in answer.list_services_response.service}
