"""Which calls a replica answers, by the last part of their paths: Serve tells a replica no more of a path than that."""

from __future__ import annotations

from dataclasses import dataclass

from grpc_health.v1 import health_pb2

from gralora.v1 import adapters_pb2, generation_pb2, server_pb2


@dataclass(frozen=True, slots=True)
class Rpc:
    """`streams`: the answer is a stream of messages."""

    path: str
    streams: bool


def rpcs(*, kserve: bool) -> dict[str, Rpc]:
    """By their names. `kserve`: with those of KServe's clients."""
    files = [generation_pb2, adapters_pb2, server_pb2, health_pb2]
    if kserve:
        from gralora.foreign import kserve_pb2  # a process can have only one file of that name

        files.append(kserve_pb2)
    found: dict[str, Rpc] = {}
    for file in files:
        for service in file.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                assert method.name not in found, f"Serve cannot tell two methods called {method.name} apart"
                found[method.name] = Rpc(f"/{service.full_name}/{method.name}", method.server_streaming)
    return found
