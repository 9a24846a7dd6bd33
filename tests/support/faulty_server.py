"""A web server on loopback that breaks off, stalls and refuses on demand, and keeps a record of all requests."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit


@dataclass
class Fault:
    """What goes wrong with one file."""

    cut_after: list[int] = field(default_factory=list)  # bytes; one entry for each connection that is cut
    stall_after: int | None = None  # bytes; then nothing more, until the server closes
    drip: bool = False  # a byte at a time
    no_ranges: bool = False
    status: int | None = None
    redirect: str | None = None


@dataclass
class Request:
    """One request, and how much body went out for it."""

    method: str
    target: str  # path and query as they came
    headers: Mapping[str, str]
    num_bytes: int = 0

    @property
    def path(self) -> str:
        return unquote(urlsplit(self.target).path)

    @property
    def file(self) -> str:
        return self.path.rpartition("/")[2]

    @property
    def range(self) -> str:
        return self.headers.get("range", "")


@dataclass
class Answer:
    """What a server that works would say; of a body with `ranges` any part can be asked for."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    ranges: bool = False


class FaultyServer:
    """Who answers is a subclass's matter; how the answer arrives is `faults`', by file name."""

    def __init__(self) -> None:
        self.faults: dict[str, Fault] = {}
        self.sent: list[Request] = []
        self.closing = threading.Event()
        self.port = 0

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def bodies(self, file: str) -> list[Request]:
        return [request for request in self.sent if request.method == "GET" and request.file == file]

    def answer(self, request: Request) -> Answer:
        raise NotImplementedError


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: FaultyServer

    def do_HEAD(self) -> None:
        self._respond()

    def do_GET(self) -> None:
        self._respond()

    def log_message(self, *args: Any) -> None:
        pass

    def _respond(self) -> None:
        request = Request(self.command, self.path, {key.lower(): value for key, value in self.headers.items()})
        self.owner.sent.append(request)
        fault = self.owner.faults.get(request.file, Fault())
        answer = self._answer(request, fault)
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        if "Content-Length" not in answer.headers and "Transfer-Encoding" not in answer.headers:
            self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command == "GET":
            self._body(request, answer.body, fault)

    def _answer(self, request: Request, fault: Fault) -> Answer:
        if fault.status is not None:
            return Answer(fault.status, {"Retry-After": "7"})
        if fault.redirect is not None:
            return Answer(302, {"Location": fault.redirect})
        answer = self.owner.answer(request)
        if answer.ranges and request.range and not fault.no_ranges:
            start = int(request.range.removeprefix("bytes=").removesuffix("-"))
            total = len(answer.body)
            headers = {**answer.headers, "Content-Range": f"bytes {start}-{total - 1}/{total}"}
            return Answer(206, headers, answer.body[start:])
        return answer

    def _body(self, request: Request, data: bytes, fault: Fault) -> None:
        if fault.cut_after:
            data = data[: fault.cut_after.pop(0)]
            self.close_connection = True
        if fault.stall_after is not None:
            data = data[: fault.stall_after]
        for chunk in [data[i : i + 1] for i in range(len(data))] if fault.drip else [data]:
            if fault.drip and self.owner.closing.wait(0.02):
                return
            try:
                self.wfile.write(chunk)
            except OSError:  # the client has given up
                return
            request.num_bytes += len(chunk)
        if fault.stall_after is not None:
            self.owner.closing.wait()


Server = TypeVar("Server", bound=FaultyServer)


@contextmanager
def serving(owner: Server) -> Iterator[Server]:
    handler = type("Handler", (_Handler,), {"owner": owner})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    owner.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield owner
    finally:
        owner.closing.set()
        server.shutdown()
        thread.join()
        server.server_close()
