"""Configuration files that are nearly right, by number, and what reading each may take. Reads them as `gralora config
check` does.
"""

from __future__ import annotations

import random
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from benchmarks.fuzz import octets
from gralora_runtime.errors import ConfigError
from gralora_server.settings import writing
from gralora_server.settings.layers import Layers

MAX_PROCESSOR_S, MAX_MEMORY_BYTES = 2.0, 64 << 20  # of one file; of all of them
ACCEPTED, REFUSED = "accepted", "refused"
BYTES_SHARE = 0.3

_COMMENTED = re.compile(r"^# (?=\[|[a-z0-9_]+ =)", re.MULTILINE)
_PAIR = re.compile(r"^([a-z0-9_]+) = (.*)$", re.MULTILINE)
_OF_KIND = {"PATH": '"x"', "TEXT": '"x"', "INTEGER": "1", "FLOAT": "1.0", "BYTES": '"1MiB"', "HOST:PORT": '"[::1]:0"'}
_OF_NAME = {
    "sha256": '"' + "0" * 64 + '"', "subject": '"a client"', "issuer": '"x"', "audience": '"x"', "jwks_file": '"x"',
    "otlp_endpoint": '"http://x"',
    "expires": "1979-05-27T07:32:00Z", "adapters": '["a/*"]',
}  # fmt: skip
_TABLE = re.compile(r"^(?:\[+[a-zA-Z._]+\]+\n)?(?:[^\[\n].*\n)+", re.MULTILINE)
_NESTED = 250  # deeper than pydantic takes
_VALUES = (
    "0", "1", "-1", "9223372036854775808", "1e400", "-0.0", "nan", "-inf", "0x7f", "1_000", '""', '"x"', '"\\u0000"',
    '"\\ud800"', '"' + "x" * 5000 + '"', '"1TiB"', '"99999999999999999999TiB"', '"-1MiB"', '"0.0000001k"', '"on"',
    '"127.0.0.1:99999"', '"[::1]:0"', '":"', '"/dev/zero"', '"/proc/self/mem"', '"hf://"', '"s3:///"', '"a,hold"',
    '"https://h/{name}{name}"', "true", "[]", '[""]', "[[[]]]", "{}", "{a = {b = {}}}", "1979-05-27T07:32:00Z",
    "07:32:00", "1979-05-27",
    "'''\n'''", '"""\n"""', "9" * 5000, "1." + "9" * 5000, "[" + "1," * 3000 + "]",
    "[" * 2000 + "]" * 2000, "[" * _NESTED + "]" * _NESTED, "{a = " * _NESTED + "1" + "}" * _NESTED,
    '"generate"', '"*"', '"0"', '"' + "0" * 64 + '"',
)  # fmt: skip
_LINES = (
    "[", "[[", "[[tenants]]", "[tenants.acme]", "[tenants.'']", '[tenants."a.b"]', "[tenants.acme.limits.x]",
    "[server]", "[" + "a." * 300 + "a]",
    "[[admin_tokens]]", "[engine.model]", "a.b.c.d = 1", "server.address = 1", "= 1", "x", "#", '"" = 1',
    "\ufeff", "\0", "'''", '"""', "[jwt]", "[tenants]", "tenants = 1", "public_adapters = [\n\n#\n'*',\n]",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Read:
    """What one file took. `problem`: what must not be; None where it was accepted or refused as it should be."""

    label: str
    problem: str | None = None


@dataclass(slots=True)
class Configs:
    """All that one seed makes, from the example of every setting."""

    seed: int
    _text: str = field(init=False)

    def __post_init__(self) -> None:
        self._text = seed_text()

    def make(self, number: int) -> bytes:
        rng = random.Random(f"{self.seed}/{number}")
        text = _shortened(rng, self._text)
        for _ in range(rng.choice((0, 1, 1, 2, 5))):
            text = rng.choice((_with_value, _with_value, _with_line, _without_line, _with_another_name))(rng, text)
        raw = text.encode("utf-8", errors="surrogatepass")
        return octets.mutated(rng, raw, self._text.encode()) if rng.random() < BYTES_SHARE else raw

    def read(self, _number: int, file: Path) -> Read:
        return read(file)


class Files(Protocol):
    """Made by number, and read as the server reads them."""

    def make(self, number: int) -> bytes: ...

    def read(self, number: int, file: Path) -> Read: ...


def seed_text() -> str:
    """`gralora config schema --toml` without comments, and with a value wherever it says only of what kind it is."""
    lines = _COMMENTED.sub("", writing.example()).splitlines()
    lines = [line for line in lines if line and not line.startswith(("#", "profile"))]  # there is no such file
    begin = next(at for at, line in enumerate(lines) if line.startswith("public_"))
    end = next(at for at in range(begin, len(lines)) if lines[at].startswith("["))
    lines = [*lines[begin:end], *lines[:begin], *lines[end:]]  # what belongs to no table comes first
    return "".join(f"{_filled(line)}\n" for line in lines)


def _filled(line: str) -> str:
    name, _, value = (part.strip() for part in line.partition("="))
    if line.startswith("[") or value not in ("", *_OF_KIND):
        return line
    return f"{name} = {_OF_NAME.get(name) or _OF_KIND.get(value, '1')}"


def read(file: Path) -> Read:
    """As `gralora config check` reads it."""
    return measured(lambda: Layers(file, {}, {}).read())


def measured(reads: Callable[[], object]) -> Read:
    """What became of one file, within what that may take."""
    started_s = time.process_time()
    try:
        reads()
        label = ACCEPTED
    except ConfigError:
        label = REFUSED
    except Exception as error:  # what this looks for
        return Read(type(error).__name__, f"{type(error).__name__}: {str(error)[:200]}")
    took_s = time.process_time() - started_s
    return Read(label, f"it took {took_s:.1f} s of processor time" if took_s > MAX_PROCESSOR_S else None)


@dataclass(slots=True)
class Findings:
    configs: int = 0
    seconds: float = 0.0
    saw: Counter[str] = field(default_factory=Counter)
    problems: dict[int, str] = field(default_factory=dict)  # by the file's number


def run(files: Files, folder: Path, *, number: int, seconds: float) -> Findings:
    """Until there have been so many of them, or the time is over."""
    findings, started_s, file = Findings(), time.monotonic(), folder / "gralora.toml"
    while findings.configs < number and time.monotonic() - started_s < seconds:
        file.write_bytes(files.make(findings.configs))
        found = files.read(findings.configs, file)
        findings.saw[found.label] += 1
        if found.problem is not None:
            findings.problems[findings.configs] = found.problem
        findings.configs += 1
    findings.seconds = time.monotonic() - started_s
    return findings


def _shortened(rng: random.Random, text: str) -> str:
    """Some of its tables, so that most files have few of them, and are quick to read."""
    share = rng.choice((0.1, 0.3, 0.6, 1.0))
    return "".join(table for table in _TABLE.findall(text) if rng.random() < share)


def _with_value(rng: random.Random, text: str) -> str:
    pairs = list(_PAIR.finditer(text))
    if not pairs:
        return text
    pair = rng.choice(pairs)
    return text[: pair.start(2)] + rng.choice(_VALUES) + text[pair.end(2) :]


def _with_another_name(rng: random.Random, text: str) -> str:
    pairs = list(_PAIR.finditer(text))
    if not pairs:
        return text
    pair = rng.choice(pairs)
    name = rng.choice((pair[1][:-1] or "x", pair[1] * 50, "address", "weight", "'é'", f"{pair[1]}.a"))
    return text[: pair.start(1)] + name + text[pair.end(1) :]


def _with_line(rng: random.Random, text: str) -> str:
    lines = text.splitlines()
    lines.insert(rng.randrange(len(lines) + 1), rng.choice((*_LINES, *lines)))
    return "\n".join(lines) + "\n"


def _without_line(rng: random.Random, text: str) -> str:
    lines = text.splitlines()
    begin = rng.randrange(len(lines) + 1)
    del lines[begin : begin + 1]
    return "\n".join(lines) + "\n"
