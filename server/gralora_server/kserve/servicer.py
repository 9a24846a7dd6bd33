"""The RPCs of this protocol, by the same doors as our own: `Generating` for what models say, `AdapterServicer` for
which there are. Errors leave as exceptions; only those of one request of a stream are told here, as others go on.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import grpc

from gralora.foreign import kserve_pb2, kserve_pb2_grpc
from gralora_runtime.errors import DrainingError, InvalidRequestError
from gralora_runtime.failure import contained
from gralora_runtime.request import Delta
from gralora_server.call_log import call_fields, log_call
from gralora_server.delivery import collect, deliver
from gralora_server.errors import StalledClientError
from gralora_server.explanation import Explanation, explain
from gralora_server.gate import Gate, Phase
from gralora_server.generating import Generating
from gralora_server.kserve.answering import Answering, refusal
from gralora_server.kserve.asking import Asked, read_request
from gralora_server.kserve.description import EXTENSIONS, PLATFORM, configuration, metadata
from gralora_server.kserve.models import Models, check_repository
from gralora_server.kserve.naming import SERVICE, ModelName, in_their_words
from gralora_server.kserve.stream import Line, serve_each
from gralora_server.repeats import Answer
from gralora_server.servicers import AdapterServicer
from gralora_server.tenants.rights import Rights

STREAM_METHOD = f"/{SERVICE}/ModelStreamInfer"
MAX_AT_ONCE = 64  # of one stream: twice the rows of a step, so that one client can keep the engine busy

Context = grpc.aio.ServicerContext[Any, Any]
Answers = Line[kserve_pb2.ModelStreamInferResponse]


class KServeServicer(kserve_pb2_grpc.GRPCInferenceServiceServicer):
    """`at_once`: requests of one stream that are served side by side."""

    def __init__(
        self,
        gate: Gate,
        generating: Generating,
        adapters: AdapterServicer,
        rights: Rights,
        *,
        write_timeout_s: float,
        at_once: int = MAX_AT_ONCE,
    ) -> None:
        self._gate = gate
        self._generating = generating
        self._models = Models(gate, adapters)
        self._rights = rights
        self._write_timeout_s = write_timeout_s
        self._at_once = at_once

    async def ServerLive(
        self, _request: kserve_pb2.ServerLiveRequest, _context: Context
    ) -> kserve_pb2.ServerLiveResponse:
        return kserve_pb2.ServerLiveResponse(live=True)

    async def ServerReady(
        self, _request: kserve_pb2.ServerReadyRequest, _context: Context
    ) -> kserve_pb2.ServerReadyResponse:
        return kserve_pb2.ServerReadyResponse(ready=self._takes_requests)

    async def ModelReady(
        self, request: kserve_pb2.ModelReadyRequest, _context: Context
    ) -> kserve_pb2.ModelReadyResponse:
        model = ModelName(request.name, request.version, prefix="")
        return kserve_pb2.ModelReadyResponse(ready=self._takes_requests and await self._models.is_ready(model))

    async def ServerMetadata(
        self, _request: kserve_pb2.ServerMetadataRequest, _context: Context
    ) -> kserve_pb2.ServerMetadataResponse:
        version = self._gate.engine.info().version
        return kserve_pb2.ServerMetadataResponse(name=PLATFORM, version=version, extensions=EXTENSIONS)

    async def ModelMetadata(
        self, request: kserve_pb2.ModelMetadataRequest, _context: Context
    ) -> kserve_pb2.ModelMetadataResponse:
        versions = await self._models.versions(ModelName(request.name, request.version, prefix=""))
        return metadata(request.name, versions)

    async def ModelConfig(
        self, request: kserve_pb2.ModelConfigRequest, _context: Context
    ) -> kserve_pb2.ModelConfigResponse:
        await self._models.versions(ModelName(request.name, request.version, prefix=""))
        return kserve_pb2.ModelConfigResponse(config=configuration(request.name))

    async def RepositoryIndex(
        self, request: kserve_pb2.RepositoryIndexRequest, _context: Context
    ) -> kserve_pb2.RepositoryIndexResponse:
        check_repository(request.repository_name, ())
        return kserve_pb2.RepositoryIndexResponse(models=await self._models.index(only_ready=request.ready))

    async def RepositoryModelLoad(
        self, request: kserve_pb2.RepositoryModelLoadRequest, _context: Context
    ) -> kserve_pb2.RepositoryModelLoadResponse:
        check_repository(request.repository_name, request.parameters)
        await self._models.load(request.model_name)
        return kserve_pb2.RepositoryModelLoadResponse()

    async def RepositoryModelUnload(
        self, request: kserve_pb2.RepositoryModelUnloadRequest, _context: Context
    ) -> kserve_pb2.RepositoryModelUnloadResponse:
        check_repository(request.repository_name, request.parameters, known=("unload_dependents",))
        await self._models.unload(request.model_name)
        return kserve_pb2.RepositoryModelUnloadResponse()

    async def ModelInfer(
        self, request: kserve_pb2.ModelInferRequest, context: Context
    ) -> kserve_pb2.ModelInferResponse:
        asked = read_request(request, base=self._models.base)
        if asked.in_pieces:
            raise InvalidRequestError(
                "stream", asked.in_pieces, "must be false here: ModelStreamInfer answers in pieces"
            )
        async with self._opened(asked, context) as answer:
            # For the log line: a name does not say which content served.
            request.id = request.id or asked.generation.request_id
            request.model_name = asked.generation.adapter
            return Answering(asked, answer.served_by).answer(await collect(answer))

    async def ModelStreamInfer(  # type: ignore[override]  # the stubs know generators only
        self, requests: AsyncIterator[kserve_pb2.ModelInferRequest], context: Context
    ) -> None:
        """Ends when the client has sent all and has all its answers; when the server drains, once what runs is done."""
        with self._gate.admit():  # or else this raises why nothing is taken
            pass
        # Not with the first answer: one that nobody reads would then keep a status from being sent.
        await context.send_initial_metadata(())
        serve = partial(self._serve, context, Line(context))
        with self._gate.listen() as woken:
            if not await serve_each(requests, serve, at_once=self._at_once, until=woken):
                raise DrainingError

    async def _serve(self, context: Context, line: Answers, request: kserve_pb2.ModelInferRequest) -> None:
        """One request of a stream: whatever becomes of it is told, and logged. Raises StalledClientError."""
        arrived_s, asked, code = time.monotonic(), None, grpc.StatusCode.OK
        told: Explanation | None = None
        try:
            self._rights.view(STREAM_METHOD)  # a stream may outlive what its caller may do
            asked = read_request(request, base=self._models.base)
            await self._answer(asked, context, line)
        except asyncio.CancelledError:
            code = grpc.StatusCode.CANCELLED
            raise
        except BaseException as error:  # a panic of a Rust library is no `Exception`
            if not contained(error):
                raise
            told = explain(error)
            code = told.code
            if isinstance(error, StalledClientError):
                raise
        finally:
            what = request if asked is None else asked.generation
            log_call(call_fields(STREAM_METHOD, what, code, time.monotonic() - arrived_s))
        if told is not None:
            await self._refuse(request, told, line)

    async def _answer(self, asked: Asked, context: Context, line: Answers) -> None:
        async with self._opened(asked, context) as answer:
            answering = Answering(asked, answer.served_by)

            async def write(delta: Delta) -> None:
                for piece in answering.pieces(delta):
                    await line.write(piece)

            await deliver(
                answer if asked.in_pieces else _whole(answer),
                write,
                request_id=asked.generation.request_id,
                min_tokens=1,
                write_timeout_s=self._write_timeout_s,
                on_slow=answer.hold,
                on_read=answer.go_on,
            )

    async def _refuse(self, request: kserve_pb2.ModelInferRequest, told: Explanation, line: Answers) -> None:
        try:
            async with asyncio.timeout(self._write_timeout_s):
                await line.write(refusal(request, told))
        except TimeoutError as cause:
            raise StalledClientError(request.id, self._write_timeout_s) from cause

    @asynccontextmanager
    async def _opened(self, asked: Asked, context: Context) -> AsyncIterator[Answer]:
        limits = [limit for limit in (context.time_remaining(), asked.timeout_s) if limit is not None]
        with in_their_words({"text": "text_input", "adapter": asked.adapter_field}):
            async with self._generating.opened(asked.generation, remaining_s=min(limits, default=None)) as answer:
                yield answer

    @property
    def _takes_requests(self) -> bool:
        return self._gate.phase is Phase.SERVING and not self._gate.stuck


async def _whole(answer: Answer) -> AsyncIterator[Delta]:
    """The whole generation as one delta."""
    yield await collect(answer)
