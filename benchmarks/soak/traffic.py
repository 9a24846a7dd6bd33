"""Requests of customers that behave as people do, and what came back of each. Judges nothing."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

from benchmarks.catalogue.answers import Answer, prompt_of
from benchmarks.catalogue.truth import Question
from benchmarks.soak.customers import CUSTOMERS, LIMITED, Customer
from gralora_server.client import AsyncClient, GraloraClientError, StreamDelta

PROMPT_TOKENS = (8, 96)
MAX_TOKENS = 24
MAX_MODEL_LEN = 160
TIMEOUT_S = 120.0  # whoever waits longer has hung
SLOW_S = 0.3  # between two messages, of a slow reader
SHORT_S = (0.02, 1.0)  # deadlines of those in a hurry
HURT = frozenset({"DEADLINE_EXCEEDED", "TOO_LATE"})  # what these may hear


def soak_prompt(name: str, vocab_size: int) -> list[int]:
    """A name's is always the same."""
    return prompt_of(name, vocab_size, random.Random(f"length of {name}").randint(*PROMPT_TOKENS))


QUESTION = Question(soak_prompt, MAX_TOKENS, MAX_MODEL_LEN)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """One request. `at_least` and `at_most`: prompt and output tokens that its tenant may be charged for it."""

    kind: str
    tenant: str
    answer: Answer
    meant: frozenset[str] = frozenset()  # errors that it may end with
    must_fail: bool = False
    ttft_s: float | None = None
    itl_s: float | None = None  # mean
    at_least: tuple[int, int] = (0, 0)
    at_most: tuple[int, int] = (0, 0)


@dataclass(slots=True)
class _Heard:
    """What has come of one answer so far."""

    sent_s: float = field(default_factory=time.monotonic)
    digest: str = ""
    tokens: list[int] = field(default_factory=list)
    prompt: int = 0  # tokens, once the server has said so
    first_s: float | None = None
    last_s: float = 0.0
    reason: str = ""
    error: str = ""


@dataclass(slots=True, kw_only=True)
class Traffic:
    """`names`: the most popular first."""

    names: Sequence[str]
    vocab_size: int
    digest_of: Callable[[str], str]  # what a name stands for, as far as is known; "": it is not
    seed: int
    clients: Mapping[str, AsyncClient]  # by tenant
    sent: list[Sent] = field(default_factory=list)
    _ids: itertools.count[int] = field(default_factory=itertools.count)
    _own: dict[str, list[str]] = field(init=False)  # names, by tenant
    _weights: dict[str, list[float]] = field(init=False)

    def __post_init__(self) -> None:
        self._own = {one.name: [name for name in self.names if one.owns(name)] for one in CUSTOMERS}
        self._weights = {
            tenant: list(itertools.accumulate(1 / rank for rank in range(1, len(names) + 1)))
            for tenant, names in self._own.items()
        }

    async def closed_loop(self, clients: int, seconds: float) -> float:
        """Each client sends its next request when the last one ended. Returns requests a second."""
        before, begun_s = len(self.sent), time.monotonic()

        async def client(number: int) -> None:
            drawn = random.Random(f"{self.seed} closed {number}")
            while time.monotonic() < begun_s + seconds:
                await self._one(drawn)

        async with asyncio.TaskGroup() as group:
            for number in range(clients):
                group.create_task(client(number))
        return (len(self.sent) - before) / (time.monotonic() - begun_s)

    async def open_loop(self, per_s: float, is_over: Callable[[], bool]) -> None:
        """Poisson. Returns when all have ended that were sent by then."""
        drawn = random.Random(f"{self.seed} open")
        due_s = time.monotonic()
        async with asyncio.TaskGroup() as group:
            while not is_over():
                due_s += drawn.expovariate(per_s)
                await asyncio.sleep(max(0.0, due_s - time.monotonic()))
                group.create_task(self._one(random.Random(drawn.random())))

    async def _one(self, drawn: random.Random) -> None:
        kinds: list[tuple[float, Callable[[random.Random, Customer, str], Awaitable[None]]]] = [
            (0.72, self._plain),
            (0.08, self._exact),
            (0.05, self._leaves),
            (0.04, self._hurried),
            (0.03, self._slow),
            (0.04, self._repeated),
            (0.04, self._invalid),
        ]
        (customer,) = drawn.choices(CUSTOMERS, [one.share for one in CUSTOMERS])
        (name,) = drawn.choices(self._own[customer.name], cum_weights=self._weights[customer.name])
        (act,) = drawn.choices([act for _, act in kinds], [share for share, _ in kinds])
        await act(drawn, customer, name)

    async def _plain(self, drawn: random.Random, customer: Customer, name: str) -> None:
        await self._ask("plain", customer, name, drawn.randint(1, MAX_TOKENS))

    async def _exact(self, drawn: random.Random, customer: Customer, name: str) -> None:
        await self._ask("exact", customer, name, drawn.randint(1, MAX_TOKENS), wanted=self.digest_of(name))

    async def _leaves(self, drawn: random.Random, customer: Customer, name: str) -> None:
        await self._ask("leaves", customer, name, drawn.randint(2, MAX_TOKENS), leaves_after=drawn.randint(1, 8))

    async def _hurried(self, drawn: random.Random, customer: Customer, name: str) -> None:
        timeout_s = drawn.uniform(*SHORT_S)
        await self._ask("hurried", customer, name, drawn.randint(1, MAX_TOKENS), timeout_s=timeout_s)

    async def _slow(self, drawn: random.Random, customer: Customer, name: str) -> None:
        await self._ask("slow", customer, name, drawn.randint(1, MAX_TOKENS), pause_s=SLOW_S)

    async def _repeated(self, drawn: random.Random, customer: Customer, name: str) -> None:
        """Twice at once, under one id: it runs once."""
        request_id, max_tokens = f"soak-{next(self._ids)}", drawn.randint(1, MAX_TOKENS)
        await asyncio.gather(
            self._ask("repeated", customer, name, max_tokens, request_id=request_id),
            self._ask("repeat", customer, name, max_tokens, request_id=request_id),
        )

    async def _invalid(self, drawn: random.Random, customer: Customer, name: str) -> None:
        others = next(one for one in self.names if not customer.owns(one))
        wrong = {
            f"{name}-unknown": "ADAPTER_NOT_FOUND",
            others: "ADAPTER_NOT_FOUND",  # as if it were unknown
            f"{name}@sha256:{'0' * 64}": "ADAPTER_VERSION_NOT_FOUND",
            name: "INVALID_REQUEST",
        }
        adapter = drawn.choice(list(wrong))
        max_tokens = MAX_MODEL_LEN if adapter == name else 1
        reasons = {wrong[adapter], "ADAPTER_NOT_FOUND"}  # the name may be away, too
        await self._ask("invalid", customer, name, max_tokens, adapter=adapter, must_fail=frozenset(reasons))

    async def _ask(
        self,
        kind: str,
        customer: Customer,
        name: str,
        max_tokens: int,
        *,
        adapter: str = "",
        wanted: str = "",
        timeout_s: float = TIMEOUT_S,
        leaves_after: int = 0,
        pause_s: float = 0.0,
        request_id: str = "",
        must_fail: frozenset[str] = frozenset(),
    ) -> None:
        prompt, heard = soak_prompt(name, self.vocab_size), _Heard()
        stream = self.clients[customer.name].stream(
            token_ids=prompt,
            adapter=adapter or (f"{name}@sha256:{wanted}" if wanted else name),
            temperature=0.0,
            max_tokens=max_tokens,
            ignore_eos=True,
            timeout_s=timeout_s,
            request_id=request_id,
        )
        try:
            async with stream:
                async for delta in stream:
                    _note(heard, delta)
                    if leaves_after and len(heard.tokens) >= leaves_after:
                        break
                    await asyncio.sleep(pause_s)
        except GraloraClientError as failed:
            heard.error = failed.reason or failed.code.name
        is_whole = not heard.error and not leaves_after and heard.reason != "deadline"
        meant = must_fail | (HURT if kind == "hurried" else frozenset())
        self.sent.append(
            Sent(
                kind=kind,
                tenant=customer.name,
                answer=_answer(name, wanted, heard, max_tokens, is_whole=is_whole),
                meant=meant | ({"QUOTA_EXCEEDED"} if customer.name == LIMITED else set()),
                must_fail=bool(must_fail),
                ttft_s=None if heard.first_s is None else heard.first_s - heard.sent_s,
                itl_s=_mean_itl_s(heard) if not pause_s else None,
                at_least=(0, 0) if kind == "repeat" else (heard.prompt, len(heard.tokens)),
                at_most=_at_most(heard, kind, len(prompt), max_tokens, is_whole=is_whole),
            )
        )


def _note(heard: _Heard, delta: StreamDelta) -> None:
    if delta.started is not None:
        heard.digest, heard.prompt = delta.started.adapter_digest, delta.started.prompt_tokens
    if delta.token_ids:
        heard.last_s = time.monotonic()
        heard.first_s = heard.first_s or heard.last_s
    heard.tokens += delta.token_ids
    if delta.finished is not None:
        heard.reason = delta.finished.reason.value


def _answer(name: str, wanted: str, heard: _Heard, max_tokens: int, *, is_whole: bool) -> Answer:
    return Answer(
        name=name,
        wanted=wanted,
        sent_s=heard.sent_s,
        ended_s=time.monotonic(),
        digest=heard.digest,
        tokens=tuple(heard.tokens),
        is_whole=is_whole,
        error=heard.error,
        max_tokens=max_tokens,
    )


def _at_most(heard: _Heard, kind: str, num_prompt: int, max_tokens: int, *, is_whole: bool) -> tuple[int, int]:
    """Who leaves may have been served more than he read; who asks again, once more than the other."""
    if (is_whole and kind != "repeat") or (heard.error and heard.error not in HURT):
        return heard.prompt, len(heard.tokens)
    return num_prompt, max_tokens


def _mean_itl_s(heard: _Heard) -> float | None:
    if heard.first_s is None or len(heard.tokens) < 2:
        return None
    return (heard.last_s - heard.first_s) / (len(heard.tokens) - 1)
