"""One call that watches adapters: whether it may go on, and what it sees after settings changed. Knows no transport."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

from gralora_runtime.adapters.watch import AdapterNews, AdapterWatch
from gralora_server.tenants.rights import Rights, View

METHOD = "/gralora.v1.AdapterService/WatchAdapters"

Sees = Callable[[str], bool]
Watch = Callable[[Sees], AdapterWatch]


class Watching:
    """Used in the task of its call. Remembers no names."""

    def __init__(self, rights: Rights, watch: Watch) -> None:
        """`watch` takes the manager's lock."""
        self._rights = rights
        self._watch_with = watch
        self._view: View | None = None
        self._watch: AdapterWatch | None = None

    async def take(self, limit: int) -> AdapterNews | None:
        """See `AdapterWatch.take`. Raises when the caller might not begin a watch now.

        After its rights changed all that it sees is told anew, and what it sees no more as removed.
        """
        view = self._rights.view(METHOD)
        if self._watch is not None and view == self._view:
            return await asyncio.to_thread(self._watch.take, limit)
        before, old = self._view, self._watch
        self._view, self._watch = view, await asyncio.to_thread(self._watch_with, view.sees)
        if before is None or old is None:
            return await asyncio.to_thread(self._watch.take, limit)
        removed = await asyncio.to_thread(self._removed, old, before, view, limit)
        return AdapterNews(adapters=(), removed=removed, synced=False)

    def close(self) -> None:
        if self._watch is not None:
            self._watch.close()

    def _removed(self, old: AdapterWatch, before: View, now: View, limit: int) -> tuple[str, ...]:
        """What was seen and is not now: what had been unregistered untold, and what is not the caller's any more."""
        old.close()
        lost = self._watch_with(lambda name: before.sees(name) and not now.sees(name))
        lost.close()
        gone = (name for news in _all(old, limit) for name in news.removed)
        hidden = (name for news in _all(lost, limit) for name in (*(one.name for one in news.adapters), *news.removed))
        return tuple(dict.fromkeys((*gone, *hidden)))


def _all(watch: AdapterWatch, limit: int) -> Iterator[AdapterNews]:
    return iter(lambda: watch.take(limit), None)
