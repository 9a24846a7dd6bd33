"""`KIND:NUMBER,NUMBER` as command lines have it, and its numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

from gralora_runtime.errors import ConfigError

Parsed = TypeVar("Parsed")


def parse(what: str, text: str, makers: dict[str, Callable[..., Parsed]], examples: str) -> Parsed:
    kind, _, rest = text.partition(":")
    try:
        return makers[kind](*(rest.split(",") if rest else ()))
    except (KeyError, TypeError, ValueError) as cause:
        raise ConfigError(f"{what} {text!r} is not understood (examples: {examples})") from cause


def positive(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise ValueError(text)
    return value


def whole(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise ValueError(text)
    return value
