"""Adapters of a model hub. What it has is asked through huggingface_hub, and kept as that library keeps it.

Files are fetched by us: `snapshot_download` takes its time limits from the environment and has none for the whole,
cannot be stopped, and compares no hash.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.hf_api import ModelInfo, RepoSibling

from gralora_runtime.adapters.catalogue.sources.downloads import Downloads, Wanted
from gralora_runtime.adapters.catalogue.sources.fetch import Checksum, Fetch, RemoteFile
from gralora_runtime.adapters.catalogue.sources.files import KNOWN_FILES
from gralora_runtime.adapters.catalogue.sources.remote_name import RemoteName, is_org, parse_name
from gralora_runtime.adapters.catalogue.sources.source import Found
from gralora_runtime.adapters.catalogue.sources.web import Asked, Web, retry_after_s
from gralora_runtime.adapters.checkpoint.header import CONFIG_FILE
from gralora_runtime.errors import AdapterSourceError, ConfigError

SCHEME = "hf://"
DEFAULT_ENDPOINT = "https://huggingface.co"
MAX_QUESTIONS = 8  # at a time; one that the hub never answers keeps its thread until the connection ends
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class HubSource:
    """`hf://org/name[@revision]` is one adapter, `hf://org` all of an organisation's, `hf://` everybody's."""

    def __init__(
        self,
        uri: str,
        *,
        downloads: Downloads,
        follows: bool,
        endpoint: str = DEFAULT_ENDPOINT,
        token: str | None = None,
        allow_any: bool = False,
        loopback_http: bool = False,
    ) -> None:
        self.uri = uri
        self.follows = follows
        self._org, self._only = _parse(uri, allow_any)
        self._downloads = downloads
        self._limits = downloads.limits
        self._cache = downloads.folder / "hub"
        self._endpoint = endpoint.rstrip("/")
        self._token: str | bool = token or False  # False: not the one that huggingface_hub would look for
        self._api = HfApi(endpoint=self._endpoint, token=self._token)
        self._web = Web(limits=self._limits, loopback_http=loopback_http)
        self._web.check_url(self._endpoint)
        self._questions = threading.BoundedSemaphore(MAX_QUESTIONS)

    def find(self, name: str) -> Found | None:
        wanted = self._wanted(name)
        if wanted is None:
            return None
        # A commit never changes, so one that is here needs no asking.
        if _COMMIT.fullmatch(wanted.revision) and self._downloads.use(self._directory(wanted, wanted.revision)):
            return self._found(wanted, wanted.revision)
        info = self._ask(name, wanted)
        if info is None or info.id != wanted.repo:  # a name that now leads elsewhere is not what was allowed
            return None
        files = list(self._files(name, info))
        if CONFIG_FILE not in {file.name for file in files}:
            return None
        commit = info.sha
        if commit is None or _COMMIT.fullmatch(commit) is None:
            raise self._error(name, f"has no commit for it but {commit!r}")
        self._obtain(name, wanted, commit, files)
        return self._found(wanted, commit)

    def locate(self, _path: Path) -> Found | None:
        """Operators name directories of this machine only."""
        return None

    def names(self) -> Iterator[str]:
        if self._only is not None:
            yield self._only.repo
            if self._only.revision:
                yield f"{self._only.repo}@{self._only.revision}"

    def close(self) -> None:
        self._downloads.close()
        self._web.close()

    def _wanted(self, name: str) -> RemoteName | None:
        """None: this source does not serve it, and nobody is asked."""
        wanted = parse_name(name)
        if wanted is None or not wanted.org:
            return None
        if self._only is None:
            return wanted if self._org in {"", wanted.org} else None
        if wanted.repo == self._only.repo and wanted.revision in {"", self._only.revision}:
            return self._only
        return None

    def _ask(self, name: str, wanted: RemoteName) -> ModelInfo | None:
        revision = wanted.revision or None
        try:
            return self._within(
                name,
                lambda: self._api.model_info(
                    wanted.repo, revision=revision, files_metadata=True, timeout=self._limits.answer_s
                ),
            )
        except GatedRepoError as cause:
            raise self._error(name, "gives it only to those that were granted access") from cause
        except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError):
            return None
        except OfflineModeIsEnabled as cause:
            raise self._error(name, "is not asked: HF_HUB_OFFLINE is set") from cause
        except HfHubHTTPError as cause:
            after_s = retry_after_s(cause.response.headers.get("retry-after", ""))
            raise self._error(name, f"answered with status {cause.response.status_code}", after_s) from cause
        except httpx2.TimeoutException as cause:
            raise self._error(name, f"did not answer within {self._limits.answer_s:g} s") from cause
        except httpx2.HTTPError as cause:
            raise self._error(name, f"cannot be reached ({cause})") from cause
        except (ValueError, TypeError, KeyError, AttributeError) as cause:
            raise self._error(name, f"gave an answer that describes no model ({type(cause).__name__})") from cause

    def _within(self, name: str, question: Callable[[], ModelInfo]) -> ModelInfo:
        """The library's timeout is between two bytes, and looking up a host has none: this one is for all of it."""
        limit_s = self._limits.answer_s
        answer: Future[ModelInfo] = Future()

        def ask() -> None:
            try:
                answer.set_result(question())
            except Exception as error:  # whose it is, `_ask` sorts out
                answer.set_exception(error)
            finally:
                self._questions.release()

        if not self._questions.acquire(timeout=limit_s):
            raise self._error(name, f"has left {MAX_QUESTIONS} questions unanswered")
        threading.Thread(target=ask, name="adapter-hub", daemon=True).start()
        try:
            return answer.result(limit_s)
        except TimeoutError as cause:
            raise self._error(name, f"did not answer within {limit_s:g} s") from cause

    def _files(self, name: str, info: ModelInfo) -> Iterator[RemoteFile]:
        for sibling in info.siblings or ():
            if sibling.rfilename in KNOWN_FILES:
                yield self._file(name, sibling)

    def _file(self, name: str, sibling: RepoSibling) -> RemoteFile:
        size: Any = sibling.lfs.size if sibling.lfs is not None else sibling.size
        digest: Any = sibling.lfs.sha256 if sibling.lfs is not None else sibling.blob_id
        pattern = _SHA256 if sibling.lfs is not None else _COMMIT
        if type(size) is not int or size < 0 or type(digest) is not str or pattern.fullmatch(digest) is None:
            raise self._error(name, f"does not say the size and the hash of {sibling.rfilename}")
        checksum = Checksum(kind="sha256" if sibling.lfs is not None else "git", value=digest)
        return RemoteFile(name=sibling.rfilename, num_bytes=size, checksum=checksum)

    def _obtain(self, name: str, wanted: RemoteName, commit: str, files: list[RemoteFile]) -> None:
        def fill(fetch: Fetch) -> None:
            for file in files:
                asked = self._asked(name, wanted, commit, file.name)
                fetch.file(file, partial(self._web.open, asked, file.num_bytes))

        directory = self._directory(wanted, commit)
        num_bytes = sum(file.num_bytes for file in files)
        self._downloads.obtain(Wanted(directory=directory, name=name, source=self.uri, num_bytes=num_bytes), fill)

    def _asked(self, name: str, wanted: RemoteName, commit: str, file: str) -> Asked:
        url = hf_hub_url(wanted.repo, file, revision=commit, endpoint=self._endpoint)
        headers = {"authorization": f"Bearer {self._token}"} if self._token else {}
        return Asked(url=url, name=name, source=self.uri, headers=headers)

    def _directory(self, wanted: RemoteName, commit: str) -> Path:
        return self._cache / repo_folder_name(repo_id=wanted.repo, repo_type="model") / "snapshots" / commit

    def _found(self, wanted: RemoteName, commit: str) -> Found:
        directory = self._directory(wanted, commit)
        return Found(directory=directory, roots=(directory,), revision=commit)

    def _error(self, name: str, problem: str, after_s: float | None = None) -> AdapterSourceError:
        return AdapterSourceError(name, self.uri, problem, after_s or self._limits.retry_after_s)


def _parse(uri: str, allow_any: bool) -> tuple[str, RemoteName | None]:
    """The organisation, and the one adapter if it is only one."""
    rest = uri.removeprefix(SCHEME)
    if not rest:
        if not allow_any:
            raise ConfigError(f"{uri}: names no organisation, so that anybody's adapter could be served")
        return "", None
    if is_org(rest):
        return rest, None
    only = parse_name(rest)
    if only is None or not only.org:
        raise ConfigError(f"{uri}: is neither {SCHEME}org nor {SCHEME}org/name nor {SCHEME}org/name@revision")
    return only.org, only
