"""The base model and its adapters as models that have versions and states. Which adapters there are `AdapterServicer`
knows, and what whoever calls may do with them.
"""

from __future__ import annotations

from collections.abc import Collection

from gralora.foreign import kserve_pb2
from gralora.v1 import adapters_pb2
from gralora_runtime.adapters.catalogue.names import Reference
from gralora_runtime.errors import AdapterNotFoundError, AdapterVersionNotFoundError, InvalidRequestError
from gralora_server.base_model import base_name
from gralora_server.gate import Gate
from gralora_server.kserve.naming import BASE_VERSION, ModelName, in_their_words
from gralora_server.servicers import NO_CONTEXT, AdapterServicer

READY, LOADING, UNAVAILABLE = "READY", "LOADING", "UNAVAILABLE"

# What is not in memory is loaded by the first request, so that is ready, too.
_STATES = {
    adapters_pb2.ADAPTER_STATE_REGISTERED: READY,
    adapters_pb2.ADAPTER_STATE_LOADING: LOADING,
    adapters_pb2.ADAPTER_STATE_HOST: READY,
    adapters_pb2.ADAPTER_STATE_RESIDENT: READY,
    adapters_pb2.ADAPTER_STATE_FAILED: UNAVAILABLE,
}

ModelIndex = kserve_pb2.RepositoryIndexResponse.ModelIndex
Version = adapters_pb2.Adapter | adapters_pb2.AdapterVersion  # the one that a name stands for, or one that it names


class Models:
    """All of them."""

    def __init__(self, gate: Gate, adapters: AdapterServicer) -> None:
        self._gate = gate
        self._adapters = adapters

    @property
    def base(self) -> str:
        """The base model's name. Raises while there is no engine."""
        return base_name(self._gate.engine.info())

    async def is_ready(self, model: ModelName) -> bool:
        """Of an adapter: whether a request for it would find it, or load it."""
        if model.is_base(self.base):
            return True
        try:
            _, version = await self._find(model.parsed())
        except AdapterNotFoundError:
            return False
        return _STATES[version.state] == READY

    async def versions(self, model: ModelName) -> list[str]:
        """All that it has. Raises AdapterNotFoundError, also if it lacks the one that is named."""
        if model.is_base(self.base):
            return [BASE_VERSION]
        adapter, _ = await self._find(model.parsed())
        return [str(version.number) for version in adapter.versions]

    async def index(self, *, only_ready: bool) -> list[ModelIndex]:
        base = ModelIndex(name=self.base, version=BASE_VERSION, state=READY)
        models = [base, *map(_indexed, await self._adapters.every())]
        return [model for model in models if model.state == READY or not only_ready]

    async def load(self, name: str) -> None:
        """The base model is there."""
        if not ModelName(name).is_base(self.base):
            with in_their_words({"name": "model_name"}):
                await self._adapters.LoadAdapter(adapters_pb2.LoadAdapterRequest(name=name), NO_CONTEXT)

    async def unload(self, name: str) -> None:
        if ModelName(name).is_base(self.base):
            raise InvalidRequestError("model_name", name, "is the base model, which stays")
        with in_their_words({"name": "model_name"}):
            await self._adapters.UnloadAdapter(adapters_pb2.UnloadAdapterRequest(name=name), NO_CONTEXT)

    async def _find(self, wanted: Reference) -> tuple[adapters_pb2.Adapter, Version]:
        request = adapters_pb2.GetAdapterRequest(name=wanted.name)
        adapter = (await self._adapters.GetAdapter(request, NO_CONTEXT)).adapter
        if not wanted.is_exact:
            return adapter, adapter
        for version in adapter.versions:
            if version.number == wanted.number or (wanted.digest and version.digest.startswith(wanted.digest)):
                return adapter, version
        numbers = [version.number for version in adapter.versions]
        raise AdapterVersionNotFoundError(wanted.name, str(wanted.number or wanted.digest), numbers)


def check_repository(name: str, parameters: Collection[str], known: Collection[str] = ()) -> None:
    """There is one repository, without a name. Raises InvalidRequestError."""
    if name:
        raise InvalidRequestError("repository_name", name, "must be empty: there is one repository")
    for parameter in parameters:
        if parameter not in known:
            raise InvalidRequestError("parameters", parameter, "is a parameter that this server does not know")


def _indexed(adapter: adapters_pb2.Adapter) -> ModelIndex:
    version = str(adapter.version) if adapter.version else ""
    return ModelIndex(name=adapter.name, version=version, state=_STATES[adapter.state], reason=adapter.error)
