"""Every RPC that the descriptors name. Knows of none by itself, so that a new one is fuzzed as soon as it is there."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass

from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

import gralora.foreign
import gralora.v1

PACKAGES = (gralora.foreign, gralora.v1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """`path` is what a channel calls it."""

    path: str
    request: type[Message]
    response: type[Message]
    sends_many: bool
    answers_many: bool

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]


def methods() -> tuple[Method, ...]:
    modules = [
        f"{package.__name__}.{one.name}"
        for package in PACKAGES
        for one in pkgutil.iter_modules(package.__path__)
        if one.name.endswith("_pb2")
    ]
    return tuple(
        Method(
            path=f"/{service.full_name}/{method.name}",
            request=GetMessageClass(method.input_type),
            response=GetMessageClass(method.output_type),
            sends_many=method.client_streaming,
            answers_many=method.server_streaming,
        )
        for module in sorted(modules)
        for service in importlib.import_module(module).DESCRIPTOR.services_by_name.values()
        for method in service.methods
    )
