"""Generations of this protocol, by the same door as our own. Errors leave as exceptions."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc

from gralora.foreign import vllm_pb2, vllm_pb2_grpc
from gralora_runtime.request import Delta
from gralora_server.base_model import base_name
from gralora_server.delivery import collect, deliver
from gralora_server.gate import Gate
from gralora_server.generating import Generating
from gralora_server.repeats import Answer
from gralora_server.sending import send
from gralora_server.vllm_grpc.answering import Answering
from gralora_server.vllm_grpc.asking import Asked, read_request
from gralora_server.vllm_grpc.naming import GENERATION, in_their_words

Context = grpc.aio.ServicerContext[Any, Any]


class VllmInference(vllm_pb2_grpc.InferenceServicer):
    """What `Generating` answers, as messages."""

    def __init__(self, gate: Gate, generating: Generating, *, write_timeout_s: float) -> None:
        self._gate = gate
        self._generating = generating
        self._write_timeout_s = write_timeout_s

    async def Generate(self, request: vllm_pb2.GenerateRequest, context: Context) -> vllm_pb2.GenerateResponse:
        asked = self._read(request)
        async with self._opened(request, asked, context) as answer:
            return Answering(asked).answer(await collect(answer))

    async def GenerateStream(  # type: ignore[override]  # the stubs know generators only
        self, request: vllm_pb2.GenerateRequest, context: Context
    ) -> None:
        with self._gate.admit():  # or else this raises why nothing is taken, and Dynamo is right to ask another
            pass
        # Whose stream ends before this, Dynamo asks nothing for seconds: a full queue would close the server to all.
        await context.send_initial_metadata(())
        asked = self._read(request)
        answering = Answering(asked)

        async def write(delta: Delta) -> None:
            for piece in answering.pieces(delta):
                await send(context, piece)

        async with self._opened(request, asked, context) as answer:
            await deliver(
                answer,
                write,
                request_id=request.request_id,
                min_tokens=1,
                write_timeout_s=self._write_timeout_s,
                on_slow=answer.hold,
                on_read=answer.go_on,
            )

    def _read(self, request: vllm_pb2.GenerateRequest) -> Asked:
        return read_request(request, base=base_name(self._gate.engine.info()))

    @asynccontextmanager
    async def _opened(self, request: vllm_pb2.GenerateRequest, asked: Asked, context: Context) -> AsyncIterator[Answer]:
        """Writes the id and what serves it into `request`, for the log line."""
        with in_their_words(GENERATION):
            async with self._generating.opened(asked.generation, remaining_s=context.time_remaining()) as answer:
                request.request_id, request.lora_name = asked.generation.request_id, asked.generation.adapter
                yield answer
