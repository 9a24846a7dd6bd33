"""How a call ended, and whether a client can tell from it what to do. Knows no fault."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Mapping

from benchmarks.faults.stage import ANSWERED, PATIENCE_S, RETRY_S
from gralora_server.client import GraloraClientError

HUNG, UNTYPED = "hung", "untyped"


async def ending_of(call: Awaitable[object], patience_s: float = PATIENCE_S) -> str:
    """`ANSWERED`, the error's reason, `HUNG`, or `UNTYPED` and the status's name where an error has no reason."""
    try:
        async with asyncio.timeout(patience_s):
            await call
    except GraloraClientError as error:
        return error.reason or f"{UNTYPED} {error.code.name}"
    except TimeoutError:
        return HUNG
    return ANSWERED


async def until_answered(call: Callable[[], Awaitable[object]]) -> str:
    """Again and again until it succeeds: `ANSWERED`, or how it ended last when `PATIENCE_S` had passed."""
    last = HUNG
    try:
        async with asyncio.timeout(PATIENCE_S):
            while (last := await ending_of(call())) != ANSWERED:
                await asyncio.sleep(RETRY_S)
    except TimeoutError:
        pass
    return last


def unexpected(endings: Mapping[str, str], expected: Mapping[str, Collection[str]]) -> list[str]:
    """What was done, and how it ended, where that is none of what it may. All that is expected has to be there."""
    return [
        f"{what}: {endings.get(what, 'not done')}, not {' or '.join(sorted(allowed))}"
        for what, allowed in expected.items()
        if endings.get(what) not in allowed
    ]


def joined(*counts: Mapping[str, int]) -> Counter[str]:
    """All of them together."""
    total: Counter[str] = Counter()
    for one in counts:
        total.update(one)
    return total
