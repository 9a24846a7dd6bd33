"""What is asked of the server itself: whether it serves, how it tokenizes, and what it understands."""

from __future__ import annotations

from collections.abc import Sequence

from google.protobuf.json_format import MessageToDict

from gralora.v1 import server_pb2
from gralora_server.gate import Gate, Phase
from gralora_server.http.asking import tokenize_request
from gralora_server.http.bodies import PromptBody
from gralora_server.http.calls import OPEN, Endpoint
from gralora_server.http.documentation import page, schema
from gralora_server.http.errors import HttpError
from gralora_server.http.exchange import Exchange
from gralora_server.servicers import NO_CONTEXT, ServerServicer


class ServerEndpoints:
    """`documented`: all others."""

    def __init__(self, gate: Gate, servicer: ServerServicer, documented: Sequence[Endpoint]) -> None:
        self._gate = gate
        self._servicer = servicer
        self._documented = documented

    def all(self) -> list[Endpoint]:
        return [
            Endpoint(verb="GET", path="/health", rpc=OPEN, says="200 while requests are taken.", serve=self._health),
            Endpoint(
                verb="POST",
                path="/tokenize",
                rpc="/gralora.v1.ServerService/Tokenize",
                says="A prompt as the model would see it.",
                serve=self._tokenize,
                body=PromptBody,
            ),
            Endpoint(
                verb="GET",
                path="/v1/requests/{request_id}/explanation",
                rpc="/gralora.v1.ServerService/ExplainRequest",
                says="Where a recent request's time went, and what cost it most.",
                serve=self._explain,
            ),
            Endpoint(verb="GET", path="/openapi.json", rpc=OPEN, says="This, as OpenAPI.", serve=self._schema),
            Endpoint(verb="GET", path="/docs", rpc=OPEN, says="This page.", serve=self._page),
        ]

    async def _health(self, exchange: Exchange, _path: dict[str, str]) -> None:
        serving = self._gate.phase is Phase.SERVING and not self._gate.stuck
        await exchange.respond(200 if serving else 503, {"status": "SERVING" if serving else "NOT_SERVING"})

    async def _tokenize(self, exchange: Exchange, _path: dict[str, str]) -> None:
        asked = tokenize_request(await exchange.body(PromptBody))
        found = await exchange.while_connected(self._servicer.Tokenize(asked, NO_CONTEXT))
        tokens = list(found.token_ids)
        await exchange.respond(200, {"tokens": tokens, "count": len(tokens), "max_model_len": found.max_model_len})

    async def _explain(self, exchange: Exchange, path: dict[str, str]) -> None:
        asked = server_pb2.ExplainRequestRequest(request_id=path["request_id"])
        found = await exchange.while_connected(self._servicer.ExplainRequest(asked, NO_CONTEXT))
        if not found.HasField("explanation"):
            raise HttpError(404, "REQUEST_NOT_FOUND", f"no recent request is called {asked.request_id!r}")
        await exchange.respond(200, MessageToDict(found.explanation, preserving_proto_field_name=True))

    async def _schema(self, exchange: Exchange, _path: dict[str, str]) -> None:
        await exchange.respond(200, schema([*self._documented, *self.all()]))

    async def _page(self, exchange: Exchange, _path: dict[str, str]) -> None:
        content = page([*self._documented, *self.all()]).encode()
        await exchange.respond_with(content, b"text/html; charset=utf-8")
