"""One who watches a manager's adapters: first all of them, then each that changes. Holds names, never infos."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from gralora_runtime.adapters.catalogue.changes import Changes, Listener
from gralora_runtime.adapters.info import AdapterInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterNews:
    """What is so now."""

    adapters: tuple[AdapterInfo, ...]
    removed: tuple[str, ...]  # names that are registered no more
    synced: bool  # all has been told that was so when the watch began


class AdapterWatch:
    """Used by one thread at a time."""

    def __init__(
        self,
        names: Iterable[str],
        listener: Listener,
        changes: Changes,
        find: Callable[[str], AdapterInfo | None],
    ) -> None:
        """`names`: what there was after the listener began to listen, so that nothing is missed."""
        self._first = deque(names)
        self._synced = False
        self._listener = listener
        self._changes = changes
        self._find = find

    def take(self, limit: int) -> AdapterNews | None:
        """News of at most so many adapters; None: there are none, until `wake` is called."""
        names = tuple(self._first.popleft() for _ in range(min(limit, len(self._first))))
        names = names or self._listener.take(limit)
        if not names and self._synced:
            return None
        infos = [(name, self._find(name)) for name in names]
        self._synced = not self._first
        return AdapterNews(
            adapters=tuple(info for _, info in infos if info is not None),
            removed=tuple(name for name, info in infos if info is None),
            synced=self._synced,
        )

    def close(self) -> None:
        self._changes.leave(self._listener)
