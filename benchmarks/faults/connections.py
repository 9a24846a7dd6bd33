"""Clients that do not read, vanish, never speak, come in thousands or leave no descriptor to others."""

from __future__ import annotations

import asyncio
import gc
import random
import resource
import socket
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress

from benchmarks.faults.fault import Fault, Outcome
from benchmarks.faults.proxy import between
from benchmarks.faults.stage import ANSWERED, GIVE_BACK_S, PATIENCE_S, Stage, Tokens, counted, not_given_back, until
from benchmarks.faults.streams import BROKEN_OFF, under_way, wrong_in
from gralora_server.client import AsyncClient, AsyncGenerationStream, GraloraClientError
from gralora_server.loadtest.local_server import LocalServer

ROWS = 4  # fewer than there are clients that do not read: each of them could be held
READERS = 2 * ROWS
WRITE_TIMEOUT_S = 6.0  # so long would somebody else wait if they kept their rows
FIRST_TOKEN_S = 2.0  # of somebody else, meanwhile
TOP_LOGPROBS = 20  # messages of some length, of which a small window holds few
GONE_S = 40.0  # keepalive: a ping after 20 s, and 10 s for its answer
CONNECTIONS = 2000
MANY_S = 120.0  # for all of them to be answered or refused
CANCELLED, AT_ONCE = 2000, 64
DESCRIPTORS = 40  # that a server may have beyond those it has
EXHAUSTING = 400  # connections, far more than that
LOOKED_AT_S = 1.5
IDLE_SHARE = 0.5  # of a core: a server that waits for a descriptor and does nothing else
OWN_CONNECTION = (("grpc.use_local_subchannel_pool", 1),)
SMALL_WINDOW = (*OWN_CONNECTION, ("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1024))
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
TLS_HELLO = bytes.fromhex("160301020001")  # the beginning of a handshake
CHATTER = (b"", PREFACE, PREFACE[:10], TLS_HELLO, b"GET / HTTP/1.1\r\n")
FEW_ROWS = ("--max-num-seqs", str(ROWS), "--write-timeout-s", str(WRITE_TIMEOUT_S))


def readers_are_silent(stage: Stage) -> Outcome:
    """They open streams and never read them, on connections that are well."""
    with stage.server(*FEW_ROWS) as server:
        return asyncio.run(_readers_are_silent(stage, server))


async def _readers_are_silent(stage: Stage, server: LocalServer) -> Outcome:
    async with AsyncClient(server.address) as client:
        expected = await stage.answers(client)
        async with AsyncClient(server.address, options=SMALL_WINDOW) as silent:
            generated = (await client.load()).generated_tokens
            streams = [_unread(stage, silent, number) for number in range(READERS)]
            await _all_begun(client, generated)
            first_s = [await _first_token_s(stage, client, expected) for _ in range(5)]
            problems = await not_given_back(client, within_s=PATIENCE_S)
            await asyncio.sleep(WRITE_TIMEOUT_S)  # also those whose last tokens were computed before they were held
            resumed_s = time.monotonic()
            saw = counted(await asyncio.gather(*map(_how_it_ended, streams), return_exceptions=True), [()] * READERS)
        recovered_s = await stage.recovered_s(client, expected, resumed_s)
    problems += [*_not_ended(saw), *_slow(first_s)]
    return Outcome(saw=saw, recovered_s=recovered_s, problems=problems, figures=_figures(first_s))


def _unread(stage: Stage, client: AsyncClient, number: int) -> AsyncGenerationStream:
    name = stage.names[number % len(stage.names)]
    return stage.stream(client, name, max_tokens=stage.long, logprobs=True, top_logprobs=TOP_LOGPROBS)


def _not_ended(saw: Mapping[str, int]) -> Iterator[str]:
    """One that could be read to its end had fitted into its window, and says nothing of those who do not read."""
    if saw["SLOW_CONSUMER"] != READERS:
        yield f"of {READERS} clients that did not read, the server ended {saw['SLOW_CONSUMER']}: {dict(saw)}"


async def _how_it_ended(stream: AsyncGenerationStream) -> Tokens:
    """Nothing is said of its tokens: whatever fitted into the window has come."""
    await stream.read()
    return ()


async def _all_begun(client: AsyncClient, generated: int) -> None:
    """Half of them could only because others, whose windows are full, had ended or given up their rows."""

    async def is_so() -> bool:
        load = await client.load()
        return load.generated_tokens > generated and not load.waiting

    await until(is_so)


async def _first_token_s(stage: Stage, client: AsyncClient, expected: Mapping[str, Tokens]) -> float:
    """Of a request whose whole answer has to be right."""
    name, tokens, first_s, asked_s = stage.names[-1], list[int](), 0.0, time.monotonic()
    async with asyncio.timeout(PATIENCE_S):
        async with stage.stream(client, name, max_tokens=len(expected[name])) as stream:
            async for delta in stream:
                first_s = first_s or time.monotonic() - asked_s
                tokens += delta.token_ids
    assert tuple(tokens) == expected[name], f"{name} answered {tokens}, not {expected[name]}"
    return first_s


def _slow(first_s: Sequence[float]) -> Iterator[str]:
    if max(first_s) > FIRST_TOKEN_S:
        yield f"somebody else waited {max(first_s):.2f} s for a first token"


def _figures(first_s: Sequence[float]) -> dict[str, float]:
    return {"longest wait for a first token meanwhile, s": max(first_s)}


def clients_are_frozen(stage: Stage) -> Outcome:
    """Their machine or process stands still, or the way to it is gone: nothing comes, and nothing is closed."""
    with stage.server(*FEW_ROWS) as server:
        return asyncio.run(_clients_are_frozen(stage, server))


async def _clients_are_frozen(stage: Stage, server: LocalServer) -> Outcome:
    async with AsyncClient(server.address) as client:
        expected, long = await stage.answers(client), await stage.long_answers(client)
        before = _descriptors(server)
        async with (
            between(server.address) as proxy,
            AsyncClient(proxy.address, max_attempts=1, options=SMALL_WINDOW) as beyond,
        ):
            streams = await under_way(stage, beyond, long, ROWS, logprobs=True, top_logprobs=TOP_LOGPROBS)
            proxy.freeze()
            frozen_s = time.monotonic()
            first_s = [await _first_token_s(stage, client, expected) for _ in range(5)]
            recovered_s = await stage.recovered_s(client, expected, frozen_s)
            problems = [*_slow(first_s), *await not_given_back(client, within_s=PATIENCE_S)]
            problems += await _not_closed(server, before, within_s=GONE_S)
            gone_s = time.monotonic() - frozen_s
            proxy.close()
            saw = await streams.saw()
    problems += wrong_in(saw, BROKEN_OFF)
    figures = _figures(first_s) | {"connections of the frozen were closed after, s": gone_s}
    return Outcome(saw=saw, recovered_s=recovered_s, problems=problems, figures=figures)


def connections_are_silent(stage: Stage) -> Outcome:
    """Some say nothing, some half a greeting in HTTP/2 or TLS, and some another protocol."""
    with _many_descriptors(), stage.server() as server:
        return asyncio.run(_connections_are_silent(stage, server))


async def _connections_are_silent(stage: Stage, server: LocalServer) -> Outcome:
    async with AsyncClient(server.address) as client:
        expected = await stage.answers(client)
        before = _descriptors(server)
        with _silent(server, CONNECTIONS):
            await until(_has_descriptors(server, before + CONNECTIONS // 2))
            first_s = [await _first_token_s(stage, client, expected) for _ in range(5)]
            first_s += await _newcomers_first_s(stage, server, expected)
            share = await _busy_share(server)
        ended_s = time.monotonic()
        recovered_s = await stage.recovered_s(client, expected, ended_s)
        problems = [*_slow(first_s), *_busy(share), *await _not_closed(server, before)]
    figures = _figures(first_s) | {"of a core while nobody asked": share}
    return Outcome(saw={ANSWERED: len(first_s)}, recovered_s=recovered_s, problems=problems, figures=figures)


async def _newcomers_first_s(stage: Stage, server: LocalServer, expected: Mapping[str, Tokens]) -> list[float]:
    async with AsyncClient(server.address, options=OWN_CONNECTION) as newcomer:
        return [await _first_token_s(stage, newcomer, expected) for _ in range(5)]


def clients_are_many(stage: Stage) -> Outcome:
    """Each comes by a connection of its own and asks at once."""
    with _many_descriptors(), stage.server() as server:
        return asyncio.run(_clients_are_many(stage, server))


async def _clients_are_many(stage: Stage, server: LocalServer) -> Outcome:
    async with AsyncClient(server.address) as client:
        expected = await stage.answers(client)
        before = _descriptors(server)
        saw, at_once = await _all_ask_at_once(stage, server, expected, before)
        ended_s = time.monotonic()
        # What the server opened to load its adapters may be closed by now.
        assert at_once > 0.99 * CONNECTIONS, f"only {at_once} connections at once"
        recovered_s = await stage.recovered_s(client, expected, ended_s)
        problems = [
            *wrong_in(saw, "QUEUE_FULL", "TOO_LATE"),
            *await not_given_back(client),
            *await _not_closed(server, before),
        ]
    return Outcome(saw=saw, recovered_s=recovered_s, problems=problems)


async def _all_ask_at_once(
    stage: Stage, server: LocalServer, expected: Mapping[str, Tokens], before: int
) -> tuple[Mapping[str, int], int]:
    """How their calls ended, and how many connections there were then.

    An error keeps the client that met it, and so its connection: none may outlive this.
    """
    names = [stage.names[number % len(stage.names)] for number in range(CONNECTIONS)]
    others = [AsyncClient(server.address, max_attempts=1, options=OWN_CONNECTION) for _ in names]
    calls = (stage.answer(other, name) for other, name in zip(others, names, strict=True))
    async with asyncio.timeout(MANY_S):
        results = await asyncio.gather(*calls, return_exceptions=True)
    at_once = _descriptors(server) - before
    await asyncio.gather(*(other.close() for other in others))
    return counted(results, [expected[name] for name in names]), at_once


def streams_are_cancelled(stage: Stage) -> Outcome:
    """Begun and left at any moment, by many at once."""
    with stage.server() as server:
        return asyncio.run(_streams_are_cancelled(stage, server))


async def _streams_are_cancelled(stage: Stage, server: LocalServer) -> Outcome:
    async with AsyncClient(server.address) as client, AsyncClient(server.address, options=OWN_CONNECTION) as leaving:
        expected = await stage.answers(client)
        await stage.answer(leaving, stage.names[0])  # by now it is connected
        before = _descriptors(server)
        numbers = iter(range(CANCELLED))
        storm = asyncio.gather(*(_begin_and_leave(stage, leaving, numbers) for _ in range(AT_ONCE)))
        results: list[Tokens | BaseException] = []
        while not storm.done():
            results += await asyncio.gather(stage.answer(client, stage.names[0]), return_exceptions=True)
        left = sum(await storm)
        ended_s = time.monotonic()
        saw = counted(results, [expected[stage.names[0]]] * len(results))
        recovered_s = await stage.recovered_s(client, expected, ended_s)
        problems = [*wrong_in(saw), *await not_given_back(client), *await _not_closed(server, before)]
    return Outcome(saw=saw, recovered_s=recovered_s, problems=problems, figures={"streams that were left": left})


async def _begin_and_leave(stage: Stage, client: AsyncClient, numbers: Iterator[int]) -> int:
    """How many; some before the server has heard of them, some in mid-stream."""
    left = 0
    for number in numbers:
        patience = random.Random(number).randrange(6)
        async with stage.stream(client, stage.names[number % len(stage.names)], max_tokens=stage.long) as stream:
            await asyncio.sleep(0)
            for _ in range(patience):
                await anext(stream)
        left += 1
    return left


def descriptors_are_gone(stage: Stage) -> Outcome:
    """Connections take all that the server's process may have, and are closed later."""
    with _many_descriptors(), stage.server("--watch", "off") as server:
        return asyncio.run(_descriptors_are_gone(stage, server))


async def _descriptors_are_gone(stage: Stage, server: LocalServer) -> Outcome:
    (unloaded, *names) = stage.names
    async with AsyncClient(server.address, max_attempts=1) as client:
        expected = await stage.answers(client)
        await client.adapters.unload(unloaded)
        before = _descriptors(server)
        most = before + DESCRIPTORS
        server.process.rlimit(resource.RLIMIT_NOFILE, (most, server.process.rlimit(resource.RLIMIT_NOFILE)[1]))
        with _silent(server, EXHAUSTING):
            await until(_has_descriptors(server, most - 1))
            results = await asyncio.gather(*(stage.answer(client, name) for name in names), return_exceptions=True)
            saw = counted(results, [expected[name] for name in names])
            refused = await _load(client, unloaded)
            share = await _busy_share(server)
        ended_s = time.monotonic()
        problems = [*wrong_in(saw), *_not_worth_another_try(refused), *_busy(share)]
        problems += await _not_loaded(client, unloaded)
        recovered_s = await _newcomer_recovered_s(stage, server, expected, ended_s)
        problems += [*await not_given_back(client), *await _not_closed(server, before)]
    saw += Counter([_how(refused)])
    figures = {"of a core while nobody asked": share}
    return Outcome(saw=saw, recovered_s=recovered_s, problems=problems, figures=figures)


async def _newcomer_recovered_s(
    stage: Stage, server: LocalServer, expected: Mapping[str, Tokens], since_s: float
) -> float:
    """For who needs a new connection."""
    async with AsyncClient(server.address, options=OWN_CONNECTION) as newcomer:
        return await stage.recovered_s(newcomer, expected, since_s)


async def _load(client: AsyncClient, name: str) -> GraloraClientError | None:
    try:
        await client.adapters.load(name)
    except GraloraClientError as error:
        return error
    return None


def _how(refused: GraloraClientError | None) -> str:
    return ANSWERED if refused is None else refused.reason or refused.code.name


def _not_worth_another_try(refused: GraloraClientError | None) -> Iterator[str]:
    """An adapter may still load: its files take few descriptors. But it must not be called broken."""
    if _how(refused) not in (ANSWERED, "OUT_OF_DESCRIPTORS"):
        yield f"loading an adapter without descriptors ended as {refused}"


async def _not_loaded(client: AsyncClient, name: str) -> list[str]:
    failed = await _load(client, name)
    return [] if failed is None else [f"{name} cannot be loaded any more: {failed}"]


@contextmanager
def _silent(server: LocalServer, number: int) -> Iterator[None]:
    """Connections that have said what they will ever say."""
    host, _, port = server.address.rpartition(":")
    with ExitStack() as open_ones:
        for index in range(number):
            one = open_ones.enter_context(socket.create_connection((host, int(port)), PATIENCE_S))
            one.sendall(CHATTER[index % len(CHATTER)])
        yield


@contextmanager
def _many_descriptors() -> Iterator[None]:
    """As many as the system lets us have, for this process and the servers that it starts."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def _descriptors(server: LocalServer) -> int:
    return server.process.num_fds()


def _has_descriptors(server: LocalServer, number: int) -> Callable[[], Awaitable[bool]]:
    async def is_so() -> bool:
        return _descriptors(server) >= number

    return is_so


async def _not_closed(server: LocalServer, before: int, *, within_s: float = GIVE_BACK_S) -> list[str]:
    """Descriptors that a server has more than before, after a while.

    A client of ours that was closed keeps its connection until its calls, which refer to each other, are collected.
    """
    gc.collect()

    async def is_so() -> bool:
        return _descriptors(server) <= before

    with suppress(TimeoutError):
        await until(is_so, within_s=within_s)
    more = _descriptors(server) - before
    return [f"{more} descriptors were not closed within {within_s:g} s"] if more > 0 else []


async def _busy_share(server: LocalServer) -> float:
    """Of a core, while the server has nothing to do."""
    before = server.process.cpu_times()
    await asyncio.sleep(LOOKED_AT_S)
    after = server.process.cpu_times()
    return (after.user + after.system - before.user - before.system) / LOOKED_AT_S


def _busy(share: float) -> Iterator[str]:
    if share > IDLE_SHARE:
        yield f"the server kept {share:.0%} of a core busy while nobody asked anything"


FAULTS = (
    Fault("silent-readers", "8 clients never read their streams, where 4 rows are all", readers_are_silent),
    Fault("frozen-clients", "clients or the way to them stand still; nothing is closed", clients_are_frozen),
    Fault("silent-connections", "2,000 connections that say nothing, or half a greeting", connections_are_silent),
    Fault("many-clients", "2,000 connections at once, each with a request", clients_are_many),
    Fault("cancel-storm", "2,000 streams are begun and left, 64 at a time", streams_are_cancelled),
    Fault("no-descriptors", "connections take every descriptor that the server may have", descriptors_are_gone),
)
