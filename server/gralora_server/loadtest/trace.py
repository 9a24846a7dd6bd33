"""A trace: every request of a run, with when it arrives. The same trace can be sent to several servers, or kept."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gralora_runtime.errors import ConfigError

VERSION = 1
# Ids below it are special tokens in every tokenizer that we know of: text has none of them.
FIRST_TOKEN_ID = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceRequest:
    """One request. It says how long its prompt is, not what it says: `prompt_ids` draws that from the seed."""

    arrival_s: float  # from the start of the run; 0 in a closed loop
    adapter: str  # "": the base model
    prompt_tokens: int
    output_tokens: int
    seed: int
    tenant: str = ""

    def prompt_ids(self, vocab_size: int) -> list[int]:
        """Token ids, the same for the same seed and vocabulary."""
        first = FIRST_TOKEN_ID if vocab_size > 2 * FIRST_TOKEN_ID else 0
        return random.Random(self.seed).choices(range(first, vocab_size), k=self.prompt_tokens)  # noqa: S311


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """Requests in the order of their arrival.

    Open loop (`concurrency` None): each is sent when it arrives, whatever became of those before. Closed loop: so many
    clients send them one after another, without a pause, until `duration_s`; after the last one they begin anew.
    """

    requests: tuple[TraceRequest, ...]
    warmup_s: float  # what happens before is not counted
    duration_s: float  # nothing is sent after it
    concurrency: int | None = None
    peak: tuple[float, float] | None = None  # from when to when more comes than before and after

    @property
    def adapters(self) -> tuple[str, ...]:
        """Their names, each once, in order."""
        return tuple(sorted({request.adapter for request in self.requests} - {""}))

    @property
    def tenants(self) -> tuple[str, ...]:
        """Their names, each once, in order."""
        return tuple(sorted({request.tenant for request in self.requests} - {""}))

    def write(self, path: Path) -> None:
        """JSON lines: a header, then one request a line."""
        times = {"warmup_s": self.warmup_s, "duration_s": self.duration_s}
        header = {"gralora_trace": VERSION, **times, "concurrency": self.concurrency, "peak": self.peak}
        lines = [header, *(asdict(request) for request in self.requests)]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    @classmethod
    def read(cls, path: Path) -> Trace:
        """Raises ConfigError, which names the line, for what is not a trace."""
        try:
            lines = path.read_text().splitlines()
        except OSError as cause:
            raise ConfigError(f"the trace {path} cannot be read: {cause.strerror}") from cause
        header = _object(path, 1, lines[0] if lines else "")
        if header.get("gralora_trace") != VERSION:
            raise ConfigError(f"{path} is no trace of version {VERSION}: its first line must say gralora_trace")
        requests = [_request(path, number, line) for number, line in enumerate(lines[1:], start=2) if line.strip()]
        if any(later.arrival_s < earlier.arrival_s for earlier, later in itertools.pairwise(requests)):
            raise ConfigError(f"{path}: the requests are not in the order of their arrival_s")
        if not requests:
            raise ConfigError(f"{path} has no requests")
        return cls(
            requests=tuple(requests),
            warmup_s=_number(path, header, "warmup_s"),
            duration_s=_number(path, header, "duration_s"),
            concurrency=_concurrency(path, header),
            peak=_peak(path, header),
        )


def _request(path: Path, number: int, line: str) -> TraceRequest:
    fields = _object(path, number, line)
    try:
        request = TraceRequest(**fields)
    except TypeError as cause:
        raise ConfigError(f"{path}, line {number}: {cause}") from cause
    wanted: Sequence[tuple[str, type | tuple[type, ...], float]] = (
        ("arrival_s", (int, float), 0),
        ("prompt_tokens", int, 1),
        ("output_tokens", int, 1),
        ("seed", int, 0),
    )
    for name, kind, least in wanted:
        value = getattr(request, name)
        if not isinstance(value, kind) or isinstance(value, bool) or value < least:  # type: ignore[operator]
            raise ConfigError(f"{path}, line {number}: {name} must be a number of at least {least}, got {value!r}")
    for name in ("adapter", "tenant"):
        if not isinstance(value := getattr(request, name), str):
            raise ConfigError(f"{path}, line {number}: {name} must be a name, got {value!r}")
    return request


def _concurrency(path: Path, header: dict[str, Any]) -> int | None:
    value = header.get("concurrency")
    if value is None or (isinstance(value, int) and value > 0):
        return value
    raise ConfigError(f"{path}: concurrency must be null or a number of at least 1, got {value!r}")


def _peak(path: Path, header: dict[str, Any]) -> tuple[float, float] | None:
    match header.get("peak"):
        case None:
            return None
        case [int() | float() as start_s, int() | float() as end_s] if 0 <= start_s < end_s:
            return (float(start_s), float(end_s))
        case value:
            raise ConfigError(f"{path}: peak must be null or two times of which the later is last, got {value!r}")


def _number(path: Path, header: dict[str, Any], name: str) -> float:
    value = header.get(name)
    if isinstance(value, int | float) and value >= 0:
        return float(value)
    raise ConfigError(f"{path}: {name} must be a number of at least 0, got {value!r}")


def _object(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError as cause:
        raise ConfigError(f"{path}, line {number}: not JSON: {cause}") from cause
    if not isinstance(value, dict):
        raise ConfigError(f"{path}, line {number}: must be an object, got {value!r}")
    return value
