"""Where an activated adapter begins in a prompt. Knows tokens, and neither adapters nor sequences."""

from __future__ import annotations

from collections.abc import Sequence

from gralora_runtime.plan import NEVER


def first_adapted(invocation: Sequence[int], prompt: Sequence[int]) -> int:
    """The first token of the last place of `invocation` in a prompt; `NEVER` if it has none, 0 without an invocation.

    From the end, as that is where it usually is, and in a time that grows with the prompt alone, whatever repeats in
    either (Knuth, Morris and Pratt's way).
    """
    if not invocation:
        return 0
    wanted = invocation[::-1]
    shorter = _borders(wanted)
    known = 0  # tokens of `wanted` that were just met
    for place in range(len(prompt) - 1, -1, -1):
        known = _longer(wanted, shorter, known, prompt[place])
        if known == len(wanted):
            return place
    return NEVER


def _borders(wanted: Sequence[int]) -> list[int]:
    """For each beginning of it, the length of the longest shorter one that it ends with."""
    borders = [0]
    for token in wanted[1:]:
        borders.append(_longer(wanted, borders, borders[-1], token))
    return borders


def _longer(wanted: Sequence[int], borders: Sequence[int], known: int, token: int) -> int:
    """How many of them are met with one more token, where `known` were before it."""
    while known and token != wanted[known]:
        known = borders[known - 1]
    return known + (token == wanted[known])
