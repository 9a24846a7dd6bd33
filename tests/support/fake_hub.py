"""A model hub on loopback: what huggingface_hub asks of one, with faults on demand, and a record of all requests."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

WEIGHTS = "adapter_model.safetensors"


@dataclass
class Fault:
    """What goes wrong with bodies of one file."""

    cut_after: list[int] = field(default_factory=list)  # bytes; one entry for each connection that is cut
    stall_after: int | None = None  # bytes; then nothing more, until the server closes
    drip: bool = False  # a byte at a time, for ever
    no_ranges: bool = False
    status: int | None = None
    redirect: str | None = None


@dataclass
class Sent:
    """One request, and how much body went out for it."""

    method: str
    path: str
    range: str
    authorization: str
    num_bytes: int = 0


class FakeHub:
    """`commits["org/name"]` maps a revision to files; `lfs` files have a SHA-256, others a git name."""

    def __init__(self) -> None:
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}
        self.refs: dict[str, dict[str, str]] = {}
        self.faults: dict[str, Fault] = {}
        self.announced: dict[str, dict[str, Any]] = {}  # file -> fields that the hub lies about
        self.answer: tuple[int, dict[str, str], bytes] | None = None  # to every question about a model
        self.sent: list[Sent] = []
        self.closing = threading.Event()
        self.port = 0

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def commit(self, repo: str, files: dict[str, bytes], *, refs: tuple[str, ...] = ("main",)) -> str:
        content = "".join(name + hashlib.sha256(data).hexdigest() for name, data in sorted(files.items()))
        sha = hashlib.sha1(content.encode()).hexdigest()
        self.commits.setdefault(repo, {})[sha] = files
        for ref in refs:
            self.refs.setdefault(repo, {})[ref] = sha
        return sha

    def bodies(self, file: str) -> list[Sent]:
        return [sent for sent in self.sent if sent.method == "GET" and sent.path.endswith("/" + file)]

    def resolve(self, repo: str, revision: str) -> str | None:
        if revision in self.commits.get(repo, {}):
            return revision
        return self.refs.get(repo, {}).get(revision)

    def info(self, repo: str, sha: str) -> dict[str, Any]:
        siblings = []
        for name, data in self.commits[repo][sha].items():
            sibling: dict[str, Any] = {
                "rfilename": name,
                "size": len(data),
                "blobId": hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest(),
            }
            if name == WEIGHTS:
                digest = hashlib.sha256(data).hexdigest()
                sibling["lfs"] = {"size": len(data), "sha256": digest, "pointerSize": 134}
            siblings.append({**sibling, **self.announced.get(name, {})})
        return {"id": repo, "sha": sha, "siblings": siblings, "private": False, "tags": []}


class Handler(BaseHTTPRequestHandler):
    """Routes of a hub."""

    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, *args: Any) -> None:
        pass

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        sent = Sent(self.command, path, self.headers.get("range", ""), self.headers.get("authorization", ""))
        self.hub.sent.append(sent)
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self._model("/".join(parts[2:4]), parts[5] if parts[4:5] == ["revision"] else "main")
        else:
            self._file(sent, "/".join(parts[:2]), parts[3], "/".join(parts[4:]))

    def _model(self, repo: str, revision: str) -> None:
        if self.hub.answer is not None:
            self._reply(*self.hub.answer)
        elif repo not in self.hub.commits:
            self._reply(404, {"X-Error-Code": "RepoNotFound"}, b"{}")
        elif (sha := self.hub.resolve(repo, revision)) is None:
            self._reply(404, {"X-Error-Code": "RevisionNotFound"}, b"{}")
        else:
            self._reply(200, {"Content-Type": "application/json"}, json.dumps(self.hub.info(repo, sha)).encode())

    def _file(self, sent: Sent, repo: str, revision: str, name: str) -> None:
        data = self.hub.commits[repo][self.hub.resolve(repo, revision)][name]
        fault = self.hub.faults.get(name, Fault())
        if fault.status is not None:
            self._reply(fault.status, {"Retry-After": "7"}, b"")
            return
        if fault.redirect is not None:
            self._reply(302, {"Location": fault.redirect}, b"")
            return
        start = 0
        if sent.range and not fault.no_ranges:
            start = int(sent.range.removeprefix("bytes=").removesuffix("-"))
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", revision)
        self.send_header("X-Linked-Size", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self._body(sent, data[start:], fault)

    def _body(self, sent: Sent, data: bytes, fault: Fault) -> None:
        end = len(data)
        if fault.cut_after:
            end = fault.cut_after.pop(0)
            self.close_connection = True
        if fault.stall_after is not None:
            end = fault.stall_after
        for chunk in [data[i : i + 1] for i in range(end)] if fault.drip else [data[:end]]:
            if fault.drip and self.hub.closing.wait(0.02):
                return
            try:
                self.wfile.write(chunk)
            except OSError:
                return
            sent.num_bytes += len(chunk)
        if fault.stall_after is not None:
            self.hub.closing.wait()

    def _reply(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    hub = FakeHub()
    handler = type("BoundHandler", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        hub.closing.set()
        server.shutdown()
        thread.join()
        server.server_close()
