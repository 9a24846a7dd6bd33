"""What every HTTP call passes through: who calls, may it, one log line, and the turning of errors into responses.

As `interceptors.py` for gRPC: a route has the rights of the RPC whose twin it is, and who may not call it is refused
with its body unread.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import grpc
from starlette.exceptions import HTTPException
from starlette.routing import Route, Router

from gralora_runtime.errors import GraloraError
from gralora_runtime.failure import contained
from gralora_server.call_log import Clock, SparseLog, begin_call, call_fields, log_call
from gralora_server.http.errors import HttpError, told
from gralora_server.http.exchange import ClientLeftError, Exchange, Receive, Scope, Send
from gralora_server.json_values import Whole
from gralora_server.tenants.caller import Caller, set_current
from gralora_server.tenants.roles import check_call
from gralora_server.tenants.tenancy import Tenancy
from gralora_server.tracing.parent import HEADER, set_parent

OPEN = ""  # the RPC of routes that need no token: what probes ask, and what is in the documentation


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """`rpc`: whose rights it takes, by its whole name. `serve` gets the parameters of the path."""

    verb: str
    path: str
    rpc: str
    says: str  # in the documentation
    serve: Callable[[Exchange, dict[str, str]], Awaitable[None]]
    body: type[Whole] | None = None
    is_logged: bool = True  # False: asked every second by a page that is open


class Calls:
    """The application that an HTTP server serves."""

    def __init__(
        self, endpoints: Sequence[Endpoint], tenancy: Tenancy, *, max_body_bytes: int, clock: Clock = time.monotonic
    ) -> None:
        routes = [Route(one.path, _Served(self, one), methods=[one.verb], name=one.path) for one in endpoints]
        self._router = Router(routes, default=_unknown, redirect_slashes=False)
        self._tenancy = tenancy
        self._max_body_bytes = max_body_bytes
        self._log = SparseLog(clock)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        scope["app"] = self  # the router then raises for a method that a path does not have
        try:
            await self._router(scope, receive, send)
        except HTTPException as error:
            await _refuse(HttpError(error.status_code, "NO_SUCH_METHOD", error.detail), scope, receive, send)

    async def serve(self, endpoint: Endpoint, scope: Scope, receive: Receive, send: Send) -> None:
        """One call of this endpoint, to its end."""
        exchange = Exchange(scope, receive, send, max_body_bytes=self._max_body_bytes)
        method = f"{endpoint.verb} {endpoint.path}"
        try:
            if endpoint.rpc != OPEN:
                self._enter(exchange, endpoint.rpc)
        except GraloraError as error:
            known, status, body, headers = told(error)
            self._log.write(call_fields(method, None, known.code, 0.0))
            await exchange.respond(status, body, headers)
            return
        set_parent(exchange.header(HEADER))
        serving = endpoint.serve(exchange, scope["path_params"])
        await _observed(method, exchange, serving, is_logged=endpoint.is_logged and endpoint.rpc != OPEN)

    def _enter(self, exchange: Exchange, rpc: str) -> None:
        authorization, peer = exchange.header("authorization"), exchange.peer

        def recognise() -> Caller:
            identities = self._tenancy.current.identities
            if identities.reads_certificates and not authorization:
                return identities.by_certificate(peer)
            return identities.by_authorization(authorization)

        caller = recognise()
        set_current(caller, recognise)
        check_call(caller.role, rpc)


async def _unknown(scope: Scope, receive: Receive, send: Send) -> None:
    await _refuse(HttpError(404, "NO_SUCH_PATH", "there is nothing here"), scope, receive, send)


async def _refuse(error: HttpError, scope: Scope, receive: Receive, send: Send) -> None:
    _, status, body, headers = told(error)
    await Exchange(scope, receive, send, max_body_bytes=0).respond(status, body, headers)


class _Served:
    """One endpoint as a route's application."""

    def __init__(self, calls: Calls, endpoint: Endpoint) -> None:
        self._calls = calls
        self._endpoint = endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._calls.serve(self._endpoint, scope, receive, send)


async def _observed(method: str, exchange: Exchange, serving: Awaitable[None], *, is_logged: bool) -> None:
    code: grpc.StatusCode = grpc.StatusCode.OK
    begin_call()
    try:
        await serving
    except ClientLeftError:
        code = grpc.StatusCode.CANCELLED
        return
    except asyncio.CancelledError:  # the server closes its connections
        code = grpc.StatusCode.CANCELLED
        raise
    except BaseException as error:  # a panic of a Rust library is no `Exception`
        if not contained(error):
            raise
        known, status, body, headers = told(error)
        code = known.code
    else:
        return
    finally:
        if is_logged:
            log_call(call_fields(method, exchange.asked, code, time.monotonic() - exchange.arrived_s))
    # May wait for a client that does not read, and so comes last: nothing is held any more.
    await exchange.farewell(status, body, headers)
