"""What a start is doing, told in stages to whoever shows them. Knows nothing of how."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Tell(Protocol):
    """Said of a stage while it goes on: how far it is, or what became of it."""

    def __call__(self, words: str = "", *, done: int = 0, total: int | None = None) -> None: ...


StartStage = Callable[[str], AbstractContextManager[Tell]]  # entered for as long as what it names goes on


@contextmanager
def untold(_name: str) -> Iterator[Tell]:
    """A stage that nobody wants to hear of."""

    def tell(words: str = "", *, done: int = 0, total: int | None = None) -> None:
        pass

    yield tell
