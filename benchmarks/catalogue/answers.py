"""Requests of many clients to names by Zipf's law, and what came back. Judges nothing."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gralora_server.client import AsyncClient, GraloraClientError

PROMPT_TOKENS, MAX_TOKENS = 8, 6
EXACT_SHARE = 0.1  # of the requests: they ask for one version by its content
LEAVING_SHARE = 0.05  # go away after the first message


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """Of one request, which went well if `error` is empty."""

    name: str
    wanted: str  # a digest; "": whatever the name stands for
    sent_s: float
    ended_s: float
    digest: str = ""
    tokens: tuple[int, ...] = ()
    is_whole: bool = True  # the client stayed until the end
    max_tokens: int = MAX_TOKENS
    error: str = ""


def prompt_of(name: str, vocab_size: int, num_tokens: int = PROMPT_TOKENS) -> list[int]:
    """A name's prompt is always the same, so that a prefix cache that took one version's pages for another's shows."""
    drawn = random.Random(name)
    return [drawn.randrange(3, vocab_size) for _ in range(num_tokens)]


@dataclass(slots=True, kw_only=True)
class Traffic:
    """Each client sends its next request when the last one ended."""

    names: Sequence[str]  # the most popular first
    vocab_size: int
    digest_of: Callable[[str], str]  # what a name stands for, as far as is known; "": it is not
    clients: int
    seed: int

    async def run(self, address: str, until_s: float) -> list[Answer]:
        answers: list[Answer] = []
        weights = list(itertools.accumulate(1 / rank for rank in range(1, len(self.names) + 1)))

        async def client(number: int) -> None:
            drawn = random.Random(f"{self.seed} {number}")
            async with AsyncClient(address) as connected:
                while time.monotonic() < until_s:
                    name = drawn.choices(self.names, cum_weights=weights)[0]
                    answers.append(await self._one(connected, drawn, name))

        async with asyncio.TaskGroup() as group:
            for number in range(self.clients):
                group.create_task(client(number))
        return answers

    async def _one(self, client: AsyncClient, drawn: random.Random, name: str) -> Answer:
        wanted = self.digest_of(name) if drawn.random() < EXACT_SHARE else ""
        leaves = drawn.random() < LEAVING_SHARE
        digest, tokens, error = "", list[int](), ""
        sent_s = time.monotonic()
        stream = client.stream(
            token_ids=prompt_of(name, self.vocab_size),
            adapter=f"{name}@sha256:{wanted}" if wanted else name,
            temperature=0.0,
            max_tokens=MAX_TOKENS,
            ignore_eos=True,
            timeout_s=120.0,
        )
        try:
            async with stream:
                async for delta in stream:
                    digest = delta.started.adapter_digest if delta.started else digest
                    tokens += delta.token_ids
                    if leaves and tokens:
                        break
        except GraloraClientError as failed:
            error = failed.reason or failed.code.name
        return Answer(
            name=name,
            wanted=wanted,
            sent_s=sent_s,
            ended_s=time.monotonic(),
            digest=digest,
            tokens=tuple(tokens),
            is_whole=not leaves,
            error=error,
        )
