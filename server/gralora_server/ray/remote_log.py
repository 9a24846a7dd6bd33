"""The changes that all replicas make, where they lie in another process: an actor that outlives every replica."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

import ray

from gralora_server.errors import ChangesLostError
from gralora_server.ray.change import Change, Entry, Outcome
from gralora_server.ray.changes import Changes

NAMESPACE = "gralora"
MAX_CALLS = 10_000  # that wait at the same time: one of each replica, and one of each change


class RemoteLog:
    """See `Changes`. Of one application of a cluster; made by the first replica that asks."""

    def __init__(self, application: str) -> None:
        self._name = f"changes-{application}"
        self._actor: Any = None

    async def offer(self, change: Change) -> int:
        number: int = await self._call("offer", change)
        return number

    async def news(self, name: str, after: int, *, serves: bool, timeout_s: float) -> list[Entry]:
        entries: list[Entry] = await self._call("news", name, after, serves=serves, timeout_s=timeout_s)
        return entries

    async def report(self, name: str, number: int, outcome: Outcome) -> None:
        await self._call("report", name, number, outcome)

    async def outcomes(self, number: int) -> dict[str, Outcome]:
        outcomes: dict[str, Outcome] = await self._call("outcomes", number)
        return outcomes

    async def restore(self, entries: Iterable[Entry]) -> None:
        await self._call("restore", list(entries))

    async def leave(self, name: str) -> None:
        await self._call("leave", name)

    async def _call(self, method: str, *arguments: Any, **options: Any) -> Any:
        try:
            if self._actor is None:
                self._actor = await asyncio.to_thread(_find, self._name)
            return await getattr(self._actor, method).remote(*arguments, **options)
        except ray.exceptions.RayActorError as cause:
            self._actor = None  # there may be another one next time
            raise ChangesLostError from cause


def _find(name: str) -> Any:
    """The actor of that name, which is made if there is none."""
    made = ray.remote(Changes).options(
        name=name,
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        num_cpus=0,
        max_restarts=-1,
        max_concurrency=MAX_CALLS,
    )
    return made.remote()
