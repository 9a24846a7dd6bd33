"""Servicers whose changes all replicas make: asked at one, they are done by the plain servicers of every one.

A version's number is each replica's own, so what names one by its number is handed on with its content instead.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from google.protobuf.message import Message

from gralora.v1 import adapters_pb2, server_pb2
from gralora_runtime.adapters.catalogue.names import parse_reference
from gralora_runtime.errors import AdapterUploadError, InvalidRequestError
from gralora_server.gate import Gate
from gralora_server.ray.affinity import plain
from gralora_server.ray.change import Change
from gralora_server.ray.follower import Follower, Log
from gralora_server.servicers import NO_CONTEXT, AdapterServicer, Context, ServerServicer
from gralora_server.settings.reloader import Reloader
from gralora_server.tenants.caller import current, set_current
from gralora_server.tenants.metering import Metering
from gralora_server.tenants.rights import Rights
from gralora_server.tenants.usage import Usage

Response = TypeVar("Response", bound=Message)

Own = tuple[type[Message], Callable[[Any, Any], Awaitable[Message]]]  # the request's kind, and what serves it here


class Sharing:
    """Of one replica: what its clients ask goes out by it, and what others' clients ask comes in."""

    def __init__(self, name: str, log: Log) -> None:
        self.follower = Follower(name, log, self._make)
        self._own: dict[str, Own] = {}

    def adapters(self, gate: Gate, rights: Rights, metering: Metering) -> AdapterServicer:
        own = AdapterServicer(gate, rights, metering)
        self._own |= {
            "LoadAdapter": (adapters_pb2.LoadAdapterRequest, own.LoadAdapter),
            "UnloadAdapter": (adapters_pb2.UnloadAdapterRequest, own.UnloadAdapter),
            "PinAdapter": (adapters_pb2.PinAdapterRequest, own.PinAdapter),
            "PromoteAdapter": (adapters_pb2.PromoteAdapterRequest, own.PromoteAdapter),
            "RollbackAdapter": (adapters_pb2.RollbackAdapterRequest, own.RollbackAdapter),
            "SetAdapterCanary": (adapters_pb2.SetAdapterCanaryRequest, own.SetAdapterCanary),
        }
        return SharedAdapterServicer(gate, rights, metering, self)

    def about(self, gate: Gate, rights: Rights, reloader: Reloader, usage: Usage) -> ServerServicer:
        own = ServerServicer(gate, rights, reloader, usage)
        self._own |= {
            "AbortRequest": (server_pb2.AbortRequestRequest, own.AbortRequest),
            "ExplainRequest": (server_pb2.ExplainRequestRequest, own.ExplainRequest),
            "ReloadConfig": (server_pb2.ReloadConfigRequest, own.ReloadConfig),
        }
        return SharedServerServicer(gate, rights, reloader, usage, self)

    async def everywhere(
        self, method: str, request: Message, answer: type[Response], *, name: str = "", is_kept: bool = True
    ) -> list[Response]:
        """The answers of all replicas, this one's first."""
        change = Change(
            method=method,
            request=request.SerializeToString(),
            caller=current(),
            name=plain(name),
            origin=self.follower.name,
            is_kept=is_kept,
        )
        outcomes = await self.follower.everywhere(change)
        return [answer.FromString(outcome.response) for outcome in outcomes.values()]

    async def _make(self, change: Change) -> bytes:
        """In a task of its own, which is its caller's from here on."""
        request, serve = self._own[change.method]
        set_current(change.caller)
        response = await serve(request.FromString(change.request), NO_CONTEXT)
        return response.SerializeToString()


class SharedAdapterServicer(AdapterServicer):
    """Looking is this replica's own, changing is everybody's."""

    def __init__(self, gate: Gate, rights: Rights, metering: Metering, sharing: Sharing) -> None:
        super().__init__(gate, rights, metering)
        self._sharing = sharing

    async def LoadAdapter(
        self, request: adapters_pb2.LoadAdapterRequest, _context: Context
    ) -> adapters_pb2.LoadAdapterResponse:
        answers = await self._sharing.everywhere(
            "LoadAdapter", request, adapters_pb2.LoadAdapterResponse, name=request.name
        )
        return answers[0]

    async def UploadAdapter(
        self, requests: AsyncIterator[adapters_pb2.UploadAdapterRequest], _context: Context
    ) -> adapters_pb2.UploadAdapterResponse:
        first = await anext(requests, adapters_pb2.UploadAdapterRequest())
        raise _no_uploads(first.header.name)

    async def GetAdapterUpload(
        self, request: adapters_pb2.GetAdapterUploadRequest, _context: Context
    ) -> adapters_pb2.GetAdapterUploadResponse:
        raise _no_uploads(request.header.name)

    async def UnloadAdapter(
        self, request: adapters_pb2.UnloadAdapterRequest, _context: Context
    ) -> adapters_pb2.UnloadAdapterResponse:
        if request.delete_upload:
            raise _no_uploads(request.name)
        request.name = await self._by_content(request.name)
        answers = await self._sharing.everywhere(
            "UnloadAdapter", request, adapters_pb2.UnloadAdapterResponse, name=request.name
        )
        return answers[0]

    async def PinAdapter(
        self, request: adapters_pb2.PinAdapterRequest, _context: Context
    ) -> adapters_pb2.PinAdapterResponse:
        request.name = await self._by_content(request.name)
        answers = await self._sharing.everywhere(
            "PinAdapter", request, adapters_pb2.PinAdapterResponse, name=request.name
        )
        return answers[0]

    async def PromoteAdapter(
        self, request: adapters_pb2.PromoteAdapterRequest, _context: Context
    ) -> adapters_pb2.PromoteAdapterResponse:
        request.version = await self._content_of(request.name, request.version)
        answers = await self._sharing.everywhere(
            "PromoteAdapter", request, adapters_pb2.PromoteAdapterResponse, name=request.name
        )
        return answers[0]

    async def RollbackAdapter(
        self, request: adapters_pb2.RollbackAdapterRequest, _context: Context
    ) -> adapters_pb2.RollbackAdapterResponse:
        answers = await self._sharing.everywhere(
            "RollbackAdapter", request, adapters_pb2.RollbackAdapterResponse, name=request.name
        )
        return answers[0]

    async def SetAdapterCanary(
        self, request: adapters_pb2.SetAdapterCanaryRequest, _context: Context
    ) -> adapters_pb2.SetAdapterCanaryResponse:
        if request.share:
            request.version = await self._content_of(request.name, request.version)
        answers = await self._sharing.everywhere(
            "SetAdapterCanary", request, adapters_pb2.SetAdapterCanaryResponse, name=request.name
        )
        return answers[0]

    async def _by_content(self, reference: str) -> str:
        """`name@3` as the same version's `name@sha256:...`; anything else as it is."""
        try:
            parsed = parse_reference("name", reference)
        except InvalidRequestError:
            return reference  # whoever has to serve it says so
        if parsed.number is None:
            return reference
        return f"{parsed.name}@{await self._content_of(parsed.name, str(parsed.number))}"

    async def _content_of(self, name: str, version: str) -> str:
        """A number, or "" for the newest, as "sha256:..."; anything else as it is."""
        if version and not version.isdecimal():
            return version
        asked = await self.GetAdapter(adapters_pb2.GetAdapterRequest(name=name), NO_CONTEXT)
        versions = {one.number: one.digest for one in asked.adapter.versions}
        number = int(version) if version else max(versions, default=0)
        return f"sha256:{versions[number]}" if number in versions else version


class SharedServerServicer(ServerServicer):
    """What concerns a request goes to all, as it may be anywhere, and so does what concerns all."""

    def __init__(self, gate: Gate, rights: Rights, reloader: Reloader, usage: Usage, sharing: Sharing) -> None:
        super().__init__(gate, rights, reloader, usage)
        self._sharing = sharing

    async def AbortRequest(
        self, request: server_pb2.AbortRequestRequest, _context: Context
    ) -> server_pb2.AbortRequestResponse:
        answers = await self._sharing.everywhere(
            "AbortRequest", request, server_pb2.AbortRequestResponse, is_kept=False
        )
        return server_pb2.AbortRequestResponse(aborted=any(answer.aborted for answer in answers))

    async def ExplainRequest(
        self, request: server_pb2.ExplainRequestRequest, _context: Context
    ) -> server_pb2.ExplainRequestResponse:
        answers = await self._sharing.everywhere(
            "ExplainRequest", request, server_pb2.ExplainRequestResponse, is_kept=False
        )
        return next((answer for answer in answers if answer.HasField("explanation")), answers[0])

    async def ReloadConfig(
        self, request: server_pb2.ReloadConfigRequest, _context: Context
    ) -> server_pb2.ReloadConfigResponse:
        answers = await self._sharing.everywhere(
            "ReloadConfig", request, server_pb2.ReloadConfigResponse, is_kept=False
        )
        return answers[0]


def _no_uploads(name: str) -> AdapterUploadError:
    return AdapterUploadError(name, "cannot be kept: replicas share no uploads, so put it where all of them look")
