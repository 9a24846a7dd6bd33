"""A model hub on loopback: what huggingface_hub asks of one, and files that it redirects nowhere."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from support.faulty_server import Answer, FaultyServer, Request

WEIGHTS = "adapter_model.safetensors"


class FakeHub(FaultyServer):
    """Weights are a file of LFS and have a SHA-256; all others have the name that git gives them."""

    def __init__(self) -> None:
        super().__init__()
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}  # repository -> commit -> files
        self.refs: dict[str, dict[str, str]] = {}
        self.announced: dict[str, dict[str, Any]] = {}  # file -> fields that the hub lies about
        self.says: Answer | None = None  # to every question about a model

    def commit(self, repo: str, files: dict[str, bytes], *, refs: tuple[str, ...] = ("main",)) -> str:
        content = "".join(name + hashlib.sha256(data).hexdigest() for name, data in sorted(files.items()))
        sha = hashlib.sha1(content.encode()).hexdigest()
        self.commits.setdefault(repo, {})[sha] = files
        for ref in refs:
            self.refs.setdefault(repo, {})[ref] = sha
        return sha

    def answer(self, request: Request) -> Answer:
        parts = request.path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            return self._model("/".join(parts[2:4]), parts[5] if parts[4:5] == ["revision"] else "main")
        repo, revision, file = "/".join(parts[:2]), parts[3], "/".join(parts[4:])
        data = self.commits[repo][self._resolve(repo, revision)][file]
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        headers = {"ETag": etag, "X-Repo-Commit": revision, "X-Linked-Size": str(len(data))}
        return Answer(200, headers, data, ranges=True)

    def info(self, repo: str, sha: str) -> dict[str, Any]:
        siblings = [self._sibling(name, data) for name, data in self.commits[repo][sha].items()]
        return {"id": repo, "sha": sha, "siblings": siblings, "private": False, "tags": []}

    def _model(self, repo: str, revision: str) -> Answer:
        if self.says is not None:
            return self.says
        if repo not in self.commits:
            return Answer(404, {"X-Error-Code": "RepoNotFound"}, b"{}")
        sha = self._resolve(repo, revision)
        if sha is None:
            return Answer(404, {"X-Error-Code": "RevisionNotFound"}, b"{}")
        return Answer(200, {"Content-Type": "application/json"}, json.dumps(self.info(repo, sha)).encode())

    def _resolve(self, repo: str, revision: str) -> str | None:
        return revision if revision in self.commits[repo] else self.refs[repo].get(revision)

    def _sibling(self, name: str, data: bytes) -> dict[str, Any]:
        blob = hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
        sibling: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": blob}
        if name == WEIGHTS:
            digest = hashlib.sha256(data).hexdigest()
            sibling["lfs"] = {"size": len(data), "sha256": digest, "pointerSize": 134}
        return {**sibling, **self.announced.get(name, {})}
