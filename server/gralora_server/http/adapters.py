"""Adapters over HTTP: a list of models, vLLM's two routes, and a twin of each unary RPC of `AdapterService`.

The twins are the servicer's own methods: a body, a query and a path become its message, field by field by their names.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from google.protobuf import json_format
from google.protobuf.message import Message

from gralora.v1 import adapters_pb2
from gralora_runtime.errors import InvalidRequestError
from gralora_server.base_model import base_name
from gralora_server.gate import Gate
from gralora_server.http.answering import Json
from gralora_server.http.bodies import LoadBody, UnloadBody
from gralora_server.http.calls import Endpoint
from gralora_server.http.exchange import Exchange
from gralora_server.servicers import NO_CONTEXT, AdapterServicer

SERVICE = "/gralora.v1.AdapterService/"
NAME = "/v1/adapters/{name:path}"

Method = Callable[[Any, Any], Awaitable[Message]]


class AdapterEndpoints:
    """What `AdapterServicer` answers, as JSON."""

    def __init__(self, gate: Gate, servicer: AdapterServicer) -> None:
        self._gate = gate
        self._servicer = servicer

    def all(self) -> list[Endpoint]:
        """More special paths go first, as a name may have slashes."""
        servicer = self._servicer
        return [
            self._endpoint("GET", "/v1/models", "ListAdapters", "The base model and all adapters.", self._models),
            self._endpoint("GET", "/v1/models/{name:path}", "GetAdapter", "One of them.", self._model),
            Endpoint(
                verb="POST",
                path="/v1/load_lora_adapter",
                rpc=SERVICE + "LoadAdapter",
                says="As vLLM has it.",
                serve=self._load_lora,
                body=LoadBody,
            ),
            Endpoint(
                verb="POST",
                path="/v1/unload_lora_adapter",
                rpc=SERVICE + "UnloadAdapter",
                says="As vLLM has it.",
                serve=self._unload_lora,
                body=UnloadBody,
            ),
            self._twin("GET", "/v1/adapters", adapters_pb2.ListAdaptersRequest, servicer.ListAdapters),
            self._twin("POST", f"{NAME}/promote", adapters_pb2.PromoteAdapterRequest, servicer.PromoteAdapter),
            self._twin("POST", f"{NAME}/rollback", adapters_pb2.RollbackAdapterRequest, servicer.RollbackAdapter),
            self._twin("POST", f"{NAME}/canary", adapters_pb2.SetAdapterCanaryRequest, servicer.SetAdapterCanary),
            self._twin("POST", f"{NAME}/pin", adapters_pb2.PinAdapterRequest, servicer.PinAdapter),
            self._twin("POST", NAME, adapters_pb2.LoadAdapterRequest, servicer.LoadAdapter),
            self._twin("GET", NAME, adapters_pb2.GetAdapterRequest, servicer.GetAdapter),
            self._twin("DELETE", NAME, adapters_pb2.UnloadAdapterRequest, servicer.UnloadAdapter),
        ]

    async def _models(self, exchange: Exchange, _path: dict[str, str]) -> None:
        base = base_name(self._gate.engine.info())
        models = [_base_model(base), *(_model(adapter, base) for adapter in await self._servicer.every())]
        await exchange.respond(200, {"object": "list", "data": models})

    async def _model(self, exchange: Exchange, path: dict[str, str]) -> None:
        base = base_name(self._gate.engine.info())
        if path["name"] == base:
            await exchange.respond(200, _base_model(base))
            return
        answer = await self._servicer.GetAdapter(adapters_pb2.GetAdapterRequest(name=path["name"]), NO_CONTEXT)
        await exchange.respond(200, _model(answer.adapter, base))

    async def _load_lora(self, exchange: Exchange, _path: dict[str, str]) -> None:
        body = await exchange.body(LoadBody)
        request = adapters_pb2.LoadAdapterRequest(name=body.lora_name, path=body.lora_path)
        exchange.asked = request
        await exchange.while_connected(self._servicer.LoadAdapter(request, NO_CONTEXT))
        await exchange.respond(200, {"message": f"Success: LoRA adapter '{body.lora_name}' added successfully."})

    async def _unload_lora(self, exchange: Exchange, _path: dict[str, str]) -> None:
        body = await exchange.body(UnloadBody)
        exchange.asked = adapters_pb2.UnloadAdapterRequest(name=body.lora_name)
        await self._servicer.UnloadAdapter(exchange.asked, NO_CONTEXT)
        await exchange.respond(200, {"message": f"Success: LoRA adapter '{body.lora_name}' removed successfully."})

    def _twin(self, verb: str, path: str, kind: type[Message], method: Method) -> Endpoint:
        async def serve(exchange: Exchange, parameters: dict[str, str]) -> None:
            given = _of_query(kind, exchange.query()) if verb != "POST" else await _object(exchange)
            exchange.asked = _message(kind, given, parameters)
            answer = await exchange.while_connected(method(exchange.asked, NO_CONTEXT))
            await exchange.respond(200, _shown(answer))

        rpc = method.__name__
        return self._endpoint(verb, path, rpc, f"The twin of {rpc}: its fields are those of {kind.__name__}.", serve)

    def _endpoint(
        self, verb: str, path: str, rpc: str, says: str, serve: Callable[[Exchange, dict[str, str]], Awaitable[None]]
    ) -> Endpoint:
        return Endpoint(verb=verb, path=path, rpc=SERVICE + rpc, says=says, serve=serve)


async def _object(exchange: Exchange) -> Json:
    """A body that is an object; none is an empty one."""
    raw = await exchange.raw_body()
    if not raw:
        return {}
    exchange.check_json()
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise InvalidRequestError("body", raw[:100], "must be a JSON object")
    return found


def _of_query(kind: type[Message], query: Mapping[str, str]) -> Json:
    """A query has texts alone: lists have commas, and booleans are words."""
    given: Json = {}
    for name, text in query.items():
        field = kind.DESCRIPTOR.fields_by_name.get(name)
        if field is not None and field.is_repeated:
            given[name] = text.split(",")
        elif field is not None and field.type == field.TYPE_BOOL:
            given[name] = {"true": True, "false": False}.get(text, text)
        else:
            given[name] = text
    return given


def _message(kind: type[Message], given: Json, parameters: Mapping[str, str]) -> Message:
    """What is in the path is not said again elsewhere."""
    for name in parameters:
        if name in given:
            raise InvalidRequestError(name, given[name], "is said by the path")
    try:
        return json_format.ParseDict({**given, **parameters}, kind())
    except json_format.ParseError as error:
        raise InvalidRequestError("body", sorted(given)[:8], str(error)[:300]) from None


def _shown(message: Message) -> Json:
    """With defaults, by the fields' own names."""
    return json_format.MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )


def _base_model(base: str) -> Json:
    return {"id": base, "object": "model", "created": 0, "owned_by": "gralora", "root": base, "parent": None}


def _model(adapter: adapters_pb2.Adapter, base: str) -> Json:
    """As vLLM shows a LoRA, and what we know beyond that."""
    state = adapters_pb2.AdapterState.Name(adapter.state).removeprefix("ADAPTER_STATE_")
    created = next((v.created.seconds for v in adapter.versions if v.number == adapter.version), 0)
    return _base_model(base) | {
        "id": adapter.name,
        "created": created,
        "root": adapter.source,
        "parent": base,
        "version": adapter.version,
        "digest": adapter.digest,
        "state": state,
        "kind": adapter.kind,
        "error": adapter.error,
    }
