"""Changes of bytes, whatever they mean."""

from __future__ import annotations

import random
from collections.abc import Callable

MAX_PIECE = 64
DEPTHS = (1, 99, 101, 5000)  # protobuf's parsers stop at 100
VARINTS = (b"\xff" * 9 + b"\x01", b"\xff" * 10, b"\x80" * 30, b"\x80", b"\xff\xff\xff\xff\x0f", b"\xff\xff\xff\xff\x07")


def mutated(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """One to four changes; `other` is what a piece may come from."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        data = rng.choice(CHANGES)(rng, data, other)
    return data


def _flip(rng: random.Random, data: bytes, _other: bytes) -> bytes:
    if not data:
        return data
    changed = bytearray(data)
    changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _cut(rng: random.Random, data: bytes, _other: bytes) -> bytes:
    begin, end = _piece(rng, data)
    return data[:begin] + data[end:]


def _truncate(rng: random.Random, data: bytes, _other: bytes) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _insert(rng: random.Random, data: bytes, _other: bytes) -> bytes:
    return _put(rng, data, rng.randbytes(rng.randrange(1, 9)))


def _duplicate(rng: random.Random, data: bytes, _other: bytes) -> bytes:
    begin, end = _piece(rng, data)
    return data[:end] + data[begin:end] * rng.choice((1, 1, 2, 50)) + data[end:]


def _splice(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """The beginning of one, the end of the other: of protobuf messages, often a message that has fields of both."""
    return data[: rng.randrange(len(data) + 1)] + other[rng.randrange(len(other) + 1) :]


def _append(_rng: random.Random, data: bytes, other: bytes) -> bytes:
    """Of protobuf messages, the two merged."""
    return data + other


def _varint(rng: random.Random, data: bytes, _other: bytes) -> bytes:
    """The end of a number that is too long, or too large."""
    return _put(rng, data, rng.choice(VARINTS))


def _nest(rng: random.Random, data: bytes, _other: bytes) -> bytes:
    """Groups in groups, which are allowed in any message, as unknown fields."""
    depth = rng.choice(DEPTHS)
    return data + b"\xa3\x06" * depth + b"\xa4\x06" * depth


def _put(rng: random.Random, data: bytes, piece: bytes) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + piece + data[at:]


def _piece(rng: random.Random, data: bytes) -> tuple[int, int]:
    begin = rng.randrange(len(data) + 1)
    return begin, min(len(data), begin + rng.randrange(1, MAX_PIECE))


CHANGES: tuple[Callable[[random.Random, bytes, bytes], bytes], ...] = (
    _flip, _flip, _cut, _truncate, _insert, _duplicate, _splice, _append, _varint, _nest,
)  # fmt: skip
