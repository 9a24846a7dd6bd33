"""Asks a web server for files, over TLS and in limited time. Knows neither what they are nor where they go."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import httpx2

from gralora_runtime.adapters.catalogue.sources.fetch import Body, CutError, Limits
from gralora_runtime.errors import AdapterSourceError, ConfigError

LOOPBACK = {"127.0.0.1", "::1", "localhost"}
MAX_RETRY_AFTER_S = 3600.0
MAX_REDIRECTS = 5
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,19})-[0-9]{1,19}/([0-9]{1,19}|\*)")
# Beyond the connection itself: the address or the answer is at fault, and another try would get the same.
_FINAL = (httpx2.UnsupportedProtocol, httpx2.LocalProtocolError, httpx2.ProxyError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One file at a web server, and for whom it is asked."""

    url: str
    name: str
    source: str
    headers: Mapping[str, str] = field(default_factory=dict)


class Web:
    """A client that speaks nothing but https, also where it is sent on; with `loopback_http` http to this machine."""

    def __init__(self, *, limits: Limits, loopback_http: bool = False) -> None:
        self._limits = limits
        self._loopback_http = loopback_http
        self._client = httpx2.Client(
            timeout=httpx2.Timeout(limits.answer_s, read=limits.stall_s),
            follow_redirects=True,
            max_redirects=MAX_REDIRECTS,
            event_hooks={"request": [self._check]},
            headers={"accept-encoding": "identity"},  # sizes and offsets are those of the file
        )

    def close(self) -> None:
        self._client.close()

    def check_url(self, url: str) -> None:
        """Before anybody asks: an operator's address that would never be asked is refused at start."""
        if not self._is_allowed(httpx2.URL(url)):
            raise ConfigError(f"{url}: adapters are fetched over https only")

    def head(self, asked: Asked) -> httpx2.Headers | None:
        """What the server says about the file; None: it has none."""
        try:
            with self._errors(asked):
                response = self._client.head(asked.url, headers=dict(asked.headers))
        except CutError as cause:
            raise self._error(asked, f"cannot be reached ({cause})") from cause
        if response.status_code in {404, 410}:
            return None
        self._check_status(asked, response)
        return response.headers

    @contextmanager
    def open(self, asked: Asked, num_bytes: int, offset: int) -> Iterator[Body]:
        """The file's bytes from `offset`, or from its start where the server has no ranges or has another file now."""
        headers = dict(asked.headers)
        if offset > 0:
            headers["range"] = f"bytes={offset}-"
        with self._errors(asked), self._client.stream("GET", asked.url, headers=headers) as response:
            self._check_status(asked, response)
            start = 0
            if response.status_code == 206:
                start = self._check_range(asked, response.headers.get("content-range", ""), offset, num_bytes)
            yield Body(start=start, chunks=response.iter_raw())

    def _check(self, request: httpx2.Request) -> None:
        if not self._is_allowed(request.url):
            raise httpx2.UnsupportedProtocol(f"leads to {request.url.copy_with(query=None)}, which is not https")

    def _is_allowed(self, url: httpx2.URL) -> bool:
        return url.scheme == "https" or (self._loopback_http and url.scheme == "http" and url.host in LOOPBACK)

    @contextmanager
    def _errors(self, asked: Asked) -> Iterator[None]:
        try:
            yield
        except httpx2.TimeoutException as cause:
            raise self._error(asked, f"sent nothing in time ({type(cause).__name__})") from cause
        except httpx2.ConnectError as cause:
            raise self._error(asked, f"cannot be reached ({cause})") from cause
        except _FINAL as cause:
            raise self._error(asked, str(cause)) from cause
        except httpx2.TransportError as cause:
            raise CutError(f"{type(cause).__name__}: {cause}") from cause
        except (httpx2.RequestError, httpx2.InvalidURL) as cause:
            raise self._error(asked, f"gave no usable answer ({cause})") from cause

    def _check_status(self, asked: Asked, response: httpx2.Response) -> None:
        if response.status_code not in {200, 206}:
            after_s = retry_after_s(response.headers.get("retry-after", ""))
            raise self._error(asked, f"answered with status {response.status_code}", after_s)

    def _check_range(self, asked: Asked, said: str, offset: int, num_bytes: int) -> int:
        match = _CONTENT_RANGE.fullmatch(said)
        if match is None or int(match[1]) != offset or match[2] not in {"*", str(num_bytes)}:
            raise self._error(asked, f"sent {said!r} when it was asked for bytes {offset} to {num_bytes}")
        return offset

    def _error(self, asked: Asked, problem: str, after_s: float | None = None) -> AdapterSourceError:
        return AdapterSourceError(asked.name, asked.source, problem, after_s or self._limits.retry_after_s)


def retry_after_s(text: str) -> float | None:
    """What a Retry-After header asks for, where it is a number of seconds."""
    try:
        seconds = float(text)
    except ValueError:
        return None
    return min(max(seconds, 1.0), MAX_RETRY_AFTER_S) if math.isfinite(seconds) else None
