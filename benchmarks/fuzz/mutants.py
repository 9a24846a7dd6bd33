"""Requests that are nearly right, by number: the same number and seed, the same bytes."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.fuzz import octets, structure
from benchmarks.fuzz.methods import Method
from benchmarks.fuzz.seeds import Seeds

VALID_SHARE = 0.05  # as they were: what is refused should have something to be told from
BYTES_SHARE = 0.4
MAX_COPIES = 3  # of a stream's message
MAX_BYTES = 16 << 20  # of a message: what is larger gRPC itself refuses, and knows no reasons of ours


@dataclass(frozen=True, slots=True)
class Mutant:
    """A call: where to, and the bytes of its messages."""

    method: Method
    parts: tuple[bytes, ...]

    def write(self, file: Path) -> None:
        """What `read` reads."""
        file.write_text(json.dumps({"path": self.method.path, "parts": [part.hex() for part in self.parts]}))

    @classmethod
    def read(cls, file: Path, methods: Sequence[Method]) -> Mutant:
        said = json.loads(file.read_text())
        method = next(method for method in methods if method.path == said["path"])
        return cls(method, tuple(bytes.fromhex(part) for part in said["parts"]))


@dataclass(frozen=True, slots=True)
class Mutants:
    """All that one seed makes."""

    seed: int
    methods: Sequence[Method]
    seeds: Seeds

    def make(self, number: int) -> Mutant:
        rng = random.Random(f"{self.seed}/{number}")
        method = self.methods[number % len(self.methods)]
        messages = self.seeds.draw(rng, method)
        how = rng.random()
        if how > VALID_SHARE + BYTES_SHARE:
            for _ in range(rng.choice((1, 1, 2, 3, 6))):
                structure.change(rng, rng.choice(messages))
        parts = [message.SerializeToString() for message in messages]
        if VALID_SHARE < how <= VALID_SHARE + BYTES_SHARE:
            other = self.seeds.draw(rng, rng.choice(self.methods))[0].SerializeToString()
            at = rng.randrange(len(parts))
            parts[at] = octets.mutated(rng, parts[at], other)
        if how > VALID_SHARE and method.sends_many:
            parts = _reordered(rng, parts)
        return Mutant(method, tuple(part[:MAX_BYTES] for part in parts))


def _reordered(rng: random.Random, parts: list[bytes]) -> list[bytes]:
    """A stream that lacks a message, has one twice, or has them in another order; mostly as it was."""
    how = rng.random()
    if how < 0.1:
        return parts[: rng.randrange(len(parts))]
    if how < 0.2:
        return [one for part in parts for one in [part] * rng.randrange(1, MAX_COPIES)]
    return rng.sample(parts, len(parts)) if how < 0.3 else parts
