"""What each request of a step may choose next: all at once, here or beside a forward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gralora_runtime.structured.matcher import Matcher


def fill(matchers: Sequence[Matcher]) -> None:
    """Of one vocabulary. Each knows of its newest token."""
    if not matchers:
        return
    words = matchers[0].vocabulary.fill([matcher.library for matcher in matchers])
    for matcher, row in zip(matchers, words, strict=True):
        matcher.take(row)


def begin(matchers: Sequence[Matcher]) -> Callable[[], None]:
    """Fill on another thread. Returns what waits for it."""
    if not matchers:
        return _nothing
    return matchers[0].vocabulary.beside.submit(fill, matchers).result


def _nothing() -> None:
    pass
