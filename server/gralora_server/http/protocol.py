"""uvicorn's HTTP/1.1, with a limit to how large a request's head may be and how long it may take to arrive."""

from __future__ import annotations

import asyncio
from http import HTTPStatus

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from gralora_server.http.exchange import ABORT, PEER
from gralora_server.http.peer import NOBODY, Names, names_of

MAX_HEAD_BYTES = 64 << 10
HEAD_S = 10.0  # from its first byte, or from a connection's beginning
LINGER_S = 1.0  # closed at once, with something unread, a connection would lose what was answered


class BoundedProtocol(HttpToolsProtocol):
    """One connection."""

    _head_bytes = 0
    _is_in_head = False
    _message_ended = False  # in the data that is looked at
    _is_refused = False
    _head_timer: asyncio.TimerHandle | None = None
    _peer: Names = NOBODY

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._peer = names_of(transport.get_extra_info("peercert"))
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unwatch_head()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_refused:
            return
        self._message_ended = False
        super().data_received(data)
        if self.transport.is_closing() or not self._is_in_head:
            return
        if not self._message_ended:  # otherwise part of it belonged to the body before
            self._head_bytes += len(data)
        if self._head_bytes > MAX_HEAD_BYTES:
            self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
        else:
            self._watch_head()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._is_in_head, self._head_bytes = True, 0
        self.scope[ABORT] = self.transport.abort  # type: ignore[literal-required]
        self.scope[PEER] = self._peer  # type: ignore[literal-required]

    def on_headers_complete(self) -> None:
        self._is_in_head = False
        self._unwatch_head()
        if self._is_refused:
            return
        if sum(len(name) + len(value) for name, value in self.headers) + len(self.url) > MAX_HEAD_BYTES:
            self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
            return
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if not self._is_refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._message_ended = True
        if not self._is_refused:
            super().on_message_complete()

    def _watch_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_S, self._refuse, HTTPStatus.REQUEST_TIMEOUT)

    def _unwatch_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _refuse(self, status: HTTPStatus) -> None:
        """Nothing that comes is looked at any more."""
        self._is_refused = True
        self._unwatch_head()
        line = f"HTTP/1.1 {status.value} {status.phrase}\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
        self.transport.write(line.encode())
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(LINGER_S, self.transport.close)
