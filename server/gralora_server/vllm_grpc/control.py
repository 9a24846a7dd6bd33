"""What is asked of the server itself by this protocol: which model and adapters it has, and changes of those.

Our own servicers do all of it, with the same rights. Errors leave as exceptions.
"""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import grpc

from gralora.foreign import vllm_pb2, vllm_pb2_grpc
from gralora.v1 import adapters_pb2, server_pb2
from gralora_runtime.errors import InvalidRequestError
from gralora_server.gate import Gate
from gralora_server.servicers import NO_CONTEXT, AdapterServicer, ServerServicer
from gralora_server.vllm_grpc.description import described, model_info, server_info
from gralora_server.vllm_grpc.naming import LIFECYCLE, in_their_words, lora_id

MAX_ABORTS = 1024  # in one call

Context = grpc.aio.ServicerContext[Any, Any]


class VllmControl(vllm_pb2_grpc.ControlServicer):
    """`model_dir`: where the base model lies; None of a server that will never have an engine."""

    def __init__(
        self, gate: Gate, adapters: AdapterServicer, server: ServerServicer, *, model_dir: Path | None
    ) -> None:
        self._gate = gate
        self._adapters = adapters
        self._server = server
        self._model_dir = model_dir
        self._instance_id = uuid.uuid4().hex

    async def GetServerInfo(self, _request: vllm_pb2.GetServerInfoRequest, _context: Context) -> vllm_pb2.ServerInfo:
        return server_info(self._gate.engine.info(), self._instance_id)

    async def GetModelInfo(self, _request: vllm_pb2.GetModelInfoRequest, _context: Context) -> vllm_pb2.ModelInfo:
        info = self._gate.engine.info()
        assert self._model_dir is not None, "a server with an engine knows where its model lies"
        return model_info(info, self._model_dir)

    async def Abort(self, request: vllm_pb2.AbortRequest, _context: Context) -> vllm_pb2.AbortResponse:
        if len(request.request_ids) > MAX_ABORTS:
            given = f"{len(request.request_ids)} entries"
            raise InvalidRequestError("request_ids", given, f"must have at most {MAX_ABORTS} entries")
        with in_their_words(LIFECYCLE):
            for request_id in request.request_ids:
                await self._server.AbortRequest(server_pb2.AbortRequestRequest(request_id=request_id), NO_CONTEXT)
        return vllm_pb2.AbortResponse()

    async def LoadLora(self, request: vllm_pb2.LoadLoraRequest, _context: Context) -> vllm_pb2.LoadLoraResponse:
        load = adapters_pb2.LoadAdapterRequest(name=request.lora_name, path=request.source_path)
        with in_their_words(LIFECYCLE):
            loaded = await self._adapters.LoadAdapter(load, NO_CONTEXT)
        return vllm_pb2.LoadLoraResponse(adapter=described(loaded.adapter))

    async def UnloadLora(self, request: vllm_pb2.UnloadLoraRequest, _context: Context) -> vllm_pb2.UnloadLoraResponse:
        name = request.lora_name
        with in_their_words(LIFECYCLE):
            await self._adapters.UnloadAdapter(adapters_pb2.UnloadAdapterRequest(name=name), NO_CONTEXT)
        return vllm_pb2.UnloadLoraResponse(adapter=vllm_pb2.LoraAdapter(lora_id=lora_id(name), lora_name=name))

    async def ListLoras(self, _request: vllm_pb2.ListLorasRequest, _context: Context) -> vllm_pb2.ListLorasResponse:
        return vllm_pb2.ListLorasResponse(adapters=[described(adapter) for adapter in await self._adapters.every()])

    async def GetKvEventSources(
        self, _request: vllm_pb2.GetKvEventSourcesRequest, _context: Context
    ) -> vllm_pb2.GetKvEventSourcesResponse:
        return vllm_pb2.GetKvEventSourcesResponse()
