"""Long prompts stand in line for one thread, and short ones do not wait for them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from gralora_runtime.errors import DrainingError
from gralora_runtime.intake.tokenizing import IDS_AT_ONCE, Tokenizing
from gralora_runtime.model.tokenization import LONG_CHARS
from gralora_runtime.request import Prompt


class SlowTokenizer:
    """Long prompts take until `finish` is set."""

    def __init__(self) -> None:
        self.finish = threading.Event()
        self.begun: list[str] = []
        self.threads: list[threading.Thread] = []

    def encode(self, prompt: Prompt, *, shorter_than: int | None = None, added_tokens: int = 0) -> list[int]:
        self.threads.append(threading.current_thread())
        name = (prompt.text or "ids").split()[0]
        self.begun.append(name)
        if name.startswith("long"):
            assert self.finish.wait(30)
        return [shorter_than or 0]


def long(number: int) -> Prompt:
    return Prompt(text=f"long{number} " + "x" * LONG_CHARS)


@contextmanager
def line() -> Iterator[tuple[SlowTokenizer, Tokenizing]]:
    slow = SlowTokenizer()
    tokenizing = Tokenizing(slow)  # type: ignore[arg-type]
    try:
        yield slow, tokenizing
    finally:
        slow.finish.set()
        tokenizing.close()


async def test_long_prompts_take_turns_and_a_short_one_passes_them() -> None:
    with line() as (slow, tokenizing):
        waiting = [asyncio.ensure_future(tokenizing.encode(long(i), shorter_than=i + 10)) for i in range(3)]
        assert await tokenizing.encode(Prompt(text="short"), shorter_than=5) == [5]
        begun = [name for name in slow.begun if name != "short"]
        slow.finish.set()

        assert await asyncio.gather(*waiting) == [[10], [11], [12]]
    assert len(begun) <= 1


async def test_ids_are_looked_at_where_they_are_unless_they_are_many() -> None:
    """Of fifty that came at once the last was received 24 ms late: each cost a thread before the next came in."""
    with line() as (slow, tokenizing):
        for num_ids in (IDS_AT_ONCE, IDS_AT_ONCE + 1):
            await tokenizing.encode(Prompt(token_ids=(1,) * num_ids))

    assert [thread is threading.current_thread() for thread in slow.threads] == [True, False]


async def test_who_leaves_the_line_costs_nothing() -> None:
    with line() as (slow, tokenizing):
        first, second, third = [asyncio.ensure_future(tokenizing.encode(long(i))) for i in range(3)]
        await asyncio.sleep(0)  # all three stand in line
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        slow.finish.set()
        await asyncio.gather(first, third)

    assert slow.begun == ["long0", "long2"]


async def test_at_the_end_nobody_is_left_in_line() -> None:
    with line() as (slow, tokenizing):
        first, second = [asyncio.ensure_future(tokenizing.encode(long(i))) for i in range(2)]
        await asyncio.sleep(0)
        tokenizing.close()
        slow.finish.set()
        await first
        with pytest.raises(DrainingError):
            await second
        with pytest.raises(DrainingError):
            await tokenizing.encode(long(2))

    assert slow.begun == ["long0"]
