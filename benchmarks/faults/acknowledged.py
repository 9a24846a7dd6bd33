"""What a server told its clients is done, and whether it still is after another start."""

from __future__ import annotations

from dataclasses import dataclass, field

from benchmarks.faults.stage import Stage, Tokens
from gralora_server.client import AsyncClient, GraloraClientError


@dataclass(frozen=True, slots=True)
class Acknowledged:
    """`requests`: of the operator, as usage told them."""

    answers: dict[str, Tokens] = field(default_factory=dict)
    pinned: list[str] = field(default_factory=list)
    requests: list[int] = field(default_factory=list)

    async def push(self, stage: Stage, client: AsyncClient, name: str) -> None:
        """Raises GraloraClientError."""
        await client.adapters.push(stage.folder / name, name)
        self.answers[name] = await stage.answer(client, name)

    async def pin(self, client: AsyncClient, name: str) -> None:
        """Raises GraloraClientError."""
        await client.adapters.pin(name)
        self.pinned.append(name)

    async def note_usage(self, client: AsyncClient) -> None:
        self.requests.append(await _requests(client))

    async def lost(self, stage: Stage, client: AsyncClient) -> list[str]:
        found = await _requests(client)
        lost = [f"{told - found} requests of the usage" for told in self.requests if found < told]
        lost += [f"that {name} is pinned" for name in self.pinned if not (await client.adapters.get(name)).pinned]
        for name, tokens in self.answers.items():
            try:
                answer = await stage.answer(client, name)
            except GraloraClientError as error:
                lost.append(f"{name}: {error}")
                continue
            if answer != tokens:
                lost.append(f"{name}, which answers {answer} and not {tokens}")
        return lost


async def _requests(client: AsyncClient) -> int:
    return sum(row.requests for row in await client.usage())
