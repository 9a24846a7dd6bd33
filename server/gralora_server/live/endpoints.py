"""What the page's port answers: its few files to anybody, what they show to an admin."""

from __future__ import annotations

import math
import re
from collections.abc import Awaitable, Callable
from importlib.resources import files

from gralora_runtime.errors import InvalidRequestError
from gralora_server.errors import PermissionDeniedError
from gralora_server.http.calls import OPEN, Endpoint
from gralora_server.http.errors import HttpError
from gralora_server.http.exchange import Exchange
from gralora_server.live.view import OPERATOR, View
from gralora_server.tenants.tenancy import Tenancy

RPC = "/gralora.v1.ServerService/GetActivity"  # whose rights it takes to look
FILES = {
    "/": ("index.html", b"text/html; charset=utf-8"),
    "/live.css": ("live.css", b"text/css; charset=utf-8"),
    "/live.js": ("live.js", b"text/javascript; charset=utf-8"),
    "/live.svg": ("live.svg", b"image/svg+xml"),
}
# The page may load what this port has, and nothing else; nobody may frame it.
POLICY = b"; ".join(
    (
        b"default-src 'none'",
        b"script-src 'self'",
        b"style-src 'self'",
        b"connect-src 'self'",
        b"img-src 'self'",
        b"base-uri 'none'",
        b"form-action 'none'",
        b"frame-ancestors 'none'",
    )
)
HEADERS = [
    (b"content-security-policy", POLICY),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
]
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
HERE = re.compile(rf"({'|'.join(map(re.escape, LOOPBACK))})(:\d+)?")


class LiveEndpoints:
    """`view` belongs to the loop that serves these."""

    def __init__(self, view: View, tenancy: Tenancy) -> None:
        self._view = view
        self._tenancy = tenancy
        folder = files("gralora_server.live") / "files"
        self._contents = {path: (folder / name).read_bytes() for path, (name, _) in FILES.items()}

    def all(self) -> list[Endpoint]:
        pages = [
            Endpoint(verb="GET", path=path, rpc=OPEN, says="A file of the page.", serve=self._serving(path))
            for path in FILES
        ]
        now = Endpoint(verb="GET", path="/now", rpc=RPC, says="What the page shows.", serve=self._now, is_logged=False)
        entry = Endpoint(
            verb="GET", path="/entry", rpc=OPEN, says="Whether it takes a token to look.", serve=self._entry
        )
        why = Endpoint(
            verb="GET", path="/explanation", rpc=RPC, says="Where a recent request's time went.", serve=self._explain
        )
        return [*pages, entry, now, why]

    def _serving(self, path: str) -> Callable[[Exchange, dict[str, str]], Awaitable[None]]:
        async def serve(exchange: Exchange, _path: dict[str, str]) -> None:
            await exchange.respond_with(self._contents[path], FILES[path][1], headers=HEADERS)

        return serve

    async def _entry(self, exchange: Exchange, _path: dict[str, str]) -> None:
        identities = self._tenancy.current.identities
        needs_token = not (identities.is_open or identities.reads_certificates)
        await exchange.respond(200, {"needs_token": needs_token}, HEADERS)

    async def _now(self, exchange: Exchange, _path: dict[str, str]) -> None:
        self._check_host(exchange)
        query = exchange.query()
        await exchange.respond(200, await self._view.now(query, _after(query)), HEADERS)

    async def _explain(self, exchange: Exchange, _path: dict[str, str]) -> None:
        self._check_host(exchange)
        tenant, request_id = exchange.query().get("tenant"), exchange.query().get("id", "")
        found = self._view.explanation("" if tenant == OPERATOR else tenant, request_id)
        if found is None:
            raise HttpError(404, "REQUEST_NOT_FOUND", f"no recent request is called {request_id[:80]!r}")
        await exchange.respond(200, found, HEADERS)

    def _check_host(self, exchange: Exchange) -> None:
        """Where anybody on this machine may look, another site's page in a browser here may not: it would come under
        its own name, which it lets stand for our address."""
        host = exchange.header("host")
        if self._tenancy.current.identities.is_open and HERE.fullmatch(host) is None:
            raise PermissionDeniedError(f"look at this page as {host[:80]!r}: without tokens only as localhost")


def _after(query: dict[str, str]) -> float:
    text = query.get("after", "0")
    try:
        after_s = float(text)
    except ValueError:
        after_s = math.nan
    if not math.isfinite(after_s):
        raise InvalidRequestError("after", text[:40], "must be seconds since the epoch")
    return after_s
