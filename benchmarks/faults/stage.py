"""Where faults happen: a base model, adapters with answers of their own, and servers in processes of their own."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.catalogue.answers import prompt_of
from benchmarks.catalogue.base import TINY_VOCAB, Base
from benchmarks.catalogue.content import Contents
from gralora_server.client import AsyncClient, AsyncGenerationStream, GraloraClientError
from gralora_server.loadtest.local_server import LocalServer, running

ANSWERED, WRONG = "answered", "wrong"
MAX_TOKENS = 8
PATIENCE_S = 60.0  # for a server to be well again: what takes longer has hung
RETRY_S = 0.02
GIVE_BACK_S = 10.0
HELD = ("running", "waiting", "waiting_for_adapter", "paused", "pages_leased", "adapter_leases")

Tokens = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Stage:
    """`folder` is empty and this fault's own."""

    base: Base
    folder: Path
    names: Sequence[str] = ("a0", "a1", "a2", "a3")

    @property
    def adapters(self) -> Path:
        return self.folder / "adapters"

    @property
    def long(self) -> int:
        """Tokens that take seconds, so that a fault comes while they are under way."""
        return 440 if self.base.vocab_size == TINY_VOCAB else 64

    def write_adapters(self) -> None:
        """One directory for each name, whose answers differ."""
        contents = Contents(self.base)
        for number, name in enumerate(self.names):
            contents.write(number, self.adapters / name)

    def arguments(self, *more: str) -> list[str]:
        """`gralora serve`: with the defaults of somebody who only says where his adapters are."""
        command = ["serve", "--model", str(self.base.path), "--adapters", str(self.adapters)]
        command += ["--state-dir", str(self.folder / "state"), "--address", "127.0.0.1:0", "--device", "cpu"]
        return [*command, "--log-level", "error", *more]

    @contextmanager
    def server(self, *more: str, environment: Mapping[str, str] | None = None) -> Iterator[LocalServer]:
        with running(self.arguments(*more), environment) as server:
            yield server

    async def answer(self, client: AsyncClient, name: str, *, max_tokens: int = MAX_TOKENS) -> Tokens:
        """Raises GraloraClientError."""
        prompt = prompt_of(name, self.base.vocab_size)
        result = await client.generate(
            token_ids=prompt, adapter=name, temperature=0.0, max_tokens=max_tokens, ignore_eos=True
        )
        return tuple(result.token_ids)

    def stream(self, client: AsyncClient, name: str, *, max_tokens: int, **options: Any) -> AsyncGenerationStream:
        """The same as `answer`, as it comes. A stream that has begun is not sent again by its client."""
        prompt = prompt_of(name, self.base.vocab_size)
        return client.stream(
            token_ids=prompt, adapter=name, temperature=0.0, max_tokens=max_tokens, ignore_eos=True, **options
        )

    async def answers(self, client: AsyncClient) -> dict[str, Tokens]:
        """Each name's, undisturbed: what it has to answer at any time."""
        return {name: await self.answer(client, name) for name in self.names}

    async def long_answers(self, client: AsyncClient) -> dict[str, Tokens]:
        results = await asyncio.gather(*(self.answer(client, name, max_tokens=self.long) for name in self.names))
        return dict(zip(self.names, results, strict=True))

    async def recovered_s(
        self,
        client: AsyncClient,
        expected: Mapping[str, Tokens],
        since_s: float,
        meanwhile: Counter[str] | None = None,
    ) -> float:
        """Seconds from `since_s`, by time.monotonic(), until every name answers right again. The calls that failed
        until then are counted in `meanwhile`, by how.

        Raises TimeoutError after `PATIENCE_S`, and AssertionError for an answer that is wrong.
        """
        async with asyncio.timeout(PATIENCE_S):
            for name, tokens in expected.items():
                while True:
                    try:
                        found = await self.answer(client, name)
                    except GraloraClientError as error:
                        if meanwhile is not None:
                            meanwhile[_how(error)] += 1
                        await asyncio.sleep(RETRY_S)
                        continue
                    assert found == tokens, f"{name} answered {found}, not {tokens}"
                    break
        return time.monotonic() - since_s


def counted(results: Sequence[Tokens | BaseException], expected: Sequence[Tokens]) -> Counter[str]:
    """How calls ended, as `asyncio.gather(..., return_exceptions=True)` tells it. Raises what is no client's error."""
    found: Counter[str] = Counter()
    for result, tokens in zip(results, expected, strict=True):
        if isinstance(result, GraloraClientError):
            found[_how(result)] += 1
        elif isinstance(result, BaseException):
            raise result
        else:
            found[ANSWERED if result == tokens else WRONG] += 1
    return found


def _how(error: GraloraClientError) -> str:
    return error.reason or error.code.name


async def until(is_so: Callable[[], Awaitable[bool]], *, within_s: float = PATIENCE_S) -> None:
    """Raises TimeoutError if it is not so in time."""
    async with asyncio.timeout(within_s):
        while True:
            if await is_so():
                return
            await asyncio.sleep(RETRY_S)


async def not_given_back(client: AsyncClient, *, within_s: float = GIVE_BACK_S) -> list[str]:
    """What a server without requests still holds after a while: rows, pages, adapters' leases."""

    async def held() -> list[str]:
        load = await client.load()
        counts = {name: getattr(load, name) for name in HELD}
        counts["pages_total"] = load.pages_total - load.pages_free - load.pages_cached
        return [f"{name} {count}" for name, count in counts.items() if count]

    with suppress(TimeoutError):
        await until(_none_of(held), within_s=within_s)
    return [f"not given back after {within_s:g} s: {each}" for each in await held()]


def _none_of(found: Callable[[], Awaitable[Sequence[object]]]) -> Callable[[], Awaitable[bool]]:
    async def is_so() -> bool:
        return not await found()

    return is_so
