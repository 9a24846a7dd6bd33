"""Processes that are killed or stopped under their clients."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import psutil

from benchmarks.catalogue.content import Contents
from benchmarks.faults.fault import Fault, Outcome
from benchmarks.faults.stage import ANSWERED, PATIENCE_S, Stage, Tokens, counted, not_given_back, until
from benchmarks.faults.streams import BROKEN_OFF, Stream, under_way, wrong_in
from gralora_server.client import Adapter, AsyncClient
from gralora_server.loadtest.local_server import LocalServer

STREAMS = 32
STOPPED_S = 5.0
DEADLINE_S = 2.0
LATE_S = 0.5  # after its deadline: a call that ends later has been held
STEP_TIMEOUT_S = 1.0  # of the engine that is stopped for several times as long
HANDED_OVER = "CANCELLED"  # gRPC's, for a call that had come and was given to nobody (grpc/grpc#41785)
WRITTEN_S = 0.1  # between rows being taken and a file that shows them
PUSHED = "pushed"


def engine_is_killed(stage: Stage) -> Outcome:
    """Under `--supervise`, which starts another."""
    with stage.server("--supervise") as server:
        return asyncio.run(_engine_is_killed(stage, server))


async def _engine_is_killed(stage: Stage, server: LocalServer) -> Outcome:
    async with AsyncClient(server.address) as client, AsyncClient(server.address, max_attempts=1) as impatient:
        expected = await stage.answers(client)
        streams = await under_way(stage, client, await stage.long_answers(client), STREAMS)
        killed_s = _kill(_engine_of(server))
        saw, meanwhile = await streams.saw(), Counter[str]()
        recovered_s = await stage.recovered_s(impatient, expected, killed_s, meanwhile)
        problems = [*_wrong(saw), *_wrong_meanwhile(meanwhile), *await not_given_back(client)]
    return Outcome(saw=saw, recovered_s=recovered_s, problems=problems, figures=_refused(meanwhile))


def _wrong_meanwhile(meanwhile: Mapping[str, int]) -> Iterator[str]:
    """They asked one after the other, so one of them at most can have come when the supervisor made way."""
    yield from wrong_in(meanwhile, BROKEN_OFF, "ENGINE_RESTARTING", HANDED_OVER)
    if meanwhile[HANDED_OVER] > 1:
        yield f"{meanwhile[HANDED_OVER]} calls were cancelled when the new engine took over"
    if not meanwhile["ENGINE_RESTARTING"]:
        yield f"nobody was told that the engine restarts: {dict(meanwhile)}"


def server_is_killed(stage: Stage) -> Outcome:
    """And started again at the same address over the same state directory, as an init system would."""
    with stage.server() as server:
        before = asyncio.run(_until_killed(stage, server))
    with stage.server("--address", server.address) as server:
        return asyncio.run(_after_the_kill(stage, server, before))


@dataclass(frozen=True, slots=True, kw_only=True)
class Acknowledged:
    """What a client knew when the server was killed."""

    pushed: Adapter
    answers: Mapping[str, Tokens]
    output_tokens: Mapping[str, int]  # used, by adapter
    saw: Mapping[str, int]
    killed_s: float


async def _until_killed(stage: Stage, server: LocalServer) -> Acknowledged:
    async with AsyncClient(server.address) as client:
        answers, long = await stage.answers(client), await stage.long_answers(client)
        pushed = await _push_promote_pin(stage, client)
        answers[PUSHED] = await stage.answer(client, PUSHED)
        used = await _written_usage(stage, client)
        streams = await under_way(stage, client, long, STREAMS)
        killed_s = _kill(server.process)
        saw = await streams.saw()
    return Acknowledged(pushed=pushed, answers=answers, output_tokens=used, saw=saw, killed_s=killed_s)


async def _push_promote_pin(stage: Stage, client: AsyncClient) -> Adapter:
    """Two versions of a name, of which the older one is promoted."""
    for number in (len(stage.names), len(stage.names) + 1):
        Contents(stage.base).write(number, stage.folder / f"content{number}")
        await client.adapters.push(stage.folder / f"content{number}", PUSHED)
    await client.adapters.promote(PUSHED, "1")
    return await client.adapters.pin(PUSHED)


async def _written_usage(stage: Stage, client: AsyncClient) -> Mapping[str, int]:
    """What the server counts now, once it has written that, too: it does so every five seconds."""
    used, asked_at = await _output_tokens(client), time.time()
    log = stage.folder / "state" / "usage.sqlite-wal"

    async def is_written() -> bool:
        return log.stat().st_mtime > asked_at + WRITTEN_S

    await stage.answer(client, stage.names[0])  # so that there is something to write
    await until(is_written)
    return used


async def _output_tokens(client: AsyncClient) -> Mapping[str, int]:
    return {usage.adapter: usage.output_tokens for usage in await client.usage()}


async def _after_the_kill(stage: Stage, server: LocalServer, before: Acknowledged) -> Outcome:
    async with AsyncClient(server.address) as client:
        recovered_s = await stage.recovered_s(client, before.answers, before.killed_s)
        lost = list(_lost(await client.adapters.get(PUSHED), before.pushed))
        used = await _output_tokens(client)
        for name, tokens in before.output_tokens.items():
            if used.get(name, 0) < tokens:
                lost.append(f"usage of {name or 'the base model'}: {used.get(name, 0)} of {tokens} output tokens")
        problems = [*_wrong(before.saw), *await not_given_back(client)]
    return Outcome(saw=before.saw, recovered_s=recovered_s, lost=lost, problems=problems)


def _lost(found: Adapter, known: Adapter) -> Iterator[str]:
    for part in ("version", "previous_version", "pinned", "digest"):
        if getattr(found, part) != getattr(known, part):
            yield f"{part} of {PUSHED}: {getattr(found, part)}, not {getattr(known, part)}"
    missing = {version.digest for version in known.versions} - {version.digest for version in found.versions}
    yield from (f"version {digest} of {PUSHED}" for digest in missing)


def supervisor_is_killed(stage: Stage) -> Outcome:
    """Its engine serves what it has begun, and leaves: nobody would keep its port. Then it is started again."""
    with stage.server("--supervise") as server:
        engine = _engine_of(server)
        saw, expected, killed_s, problems = asyncio.run(_supervisor_is_killed(stage, server, engine))
    with stage.server("--supervise", "--address", server.address) as server:
        recovered_s = asyncio.run(_recovered_s(stage, server, expected, killed_s))
    return Outcome(saw=saw, recovered_s=recovered_s, problems=problems)


async def _supervisor_is_killed(
    stage: Stage, server: LocalServer, engine: psutil.Process
) -> tuple[Mapping[str, int], Mapping[str, Tokens], float, Sequence[str]]:
    async with AsyncClient(server.address, max_attempts=1) as client:
        expected = await stage.answers(client)
        streams = await under_way(stage, client, await stage.long_answers(client), STREAMS)
        killed_s = _kill(server.process)
        new = await _refused_from_now_on(stage, client)
        saw = await streams.saw()
        problems = [*wrong_in(saw), *wrong_in(new, "DRAINING", BROKEN_OFF)]
    try:
        await asyncio.to_thread(engine.wait, PATIENCE_S)
    except psutil.TimeoutExpired:
        problems.append(f"the engine outlived its supervisor by {PATIENCE_S:g} s")
        engine.kill()
    return saw, expected, killed_s, problems


async def _refused_from_now_on(stage: Stage, client: AsyncClient) -> Mapping[str, int]:
    """How new calls end, up to the first that is refused."""
    found = Counter[str]()

    async def is_refused() -> bool:
        (result,) = await asyncio.gather(stage.answer(client, stage.names[0], max_tokens=1), return_exceptions=True)
        (how,) = counted([result], [result if isinstance(result, tuple) else ()])
        found[how] += 1
        return how != ANSWERED

    await until(is_refused)
    return found


async def _recovered_s(stage: Stage, server: LocalServer, expected: Mapping[str, Tokens], since_s: float) -> float:
    async with AsyncClient(server.address) as client:
        return await stage.recovered_s(client, expected, since_s)


def server_is_stopped(stage: Stage) -> Outcome:
    """And goes on."""
    with stage.server() as server:
        return asyncio.run(_is_stopped(stage, server, server.process))


def engine_is_stopped(stage: Stage) -> Outcome:
    """Under `--supervise`, for longer than a step may take. Whoever suspends a process means to resume it: its
    watchdog does not count that time, and its supervisor starts no other.
    """
    with stage.server("--supervise", "--step-timeout-s", str(STEP_TIMEOUT_S)) as server:
        engine = _engine_of(server)
        outcome = asyncio.run(_is_stopped(stage, server, engine))
        if not engine.is_running() or _engine_of(server) != engine:
            return Outcome(saw=outcome.saw, recovered_s=outcome.recovered_s, problems=["the engine was replaced"])
        return outcome


async def _is_stopped(stage: Stage, server: LocalServer, process: psutil.Process) -> Outcome:
    async with AsyncClient(server.address) as client:
        expected, long = await stage.answers(client), await stage.long_answers(client)
        streams = await under_way(stage, client, long, STREAMS)
        with _stopped(process):
            streams.check_under_way()
            hurried = await _with_deadline(stage, client, expected)
            await asyncio.sleep(STOPPED_S - DEADLINE_S)
        resumed_s = time.monotonic()
        recovered_s = await stage.recovered_s(client, expected, resumed_s)
        saw = await streams.saw()
        problems = [*wrong_in(saw), *_late(hurried), *await not_given_back(client)]
    figures = {"call with a deadline ended after, s": hurried.ended_s - hurried.begun_s}
    return Outcome(saw=saw + Counter([hurried.ended]), recovered_s=recovered_s, problems=problems, figures=figures)


@contextmanager
def _stopped(process: psutil.Process) -> Iterator[None]:
    process.suspend()
    try:
        yield
    finally:
        process.resume()


async def _with_deadline(stage: Stage, client: AsyncClient, expected: Mapping[str, Tokens]) -> Stream:
    stream = Stream(stage.names[0], expected[stage.names[0]], begun_s=time.monotonic())
    await stream.read(stage, client, timeout_s=DEADLINE_S)
    return stream


def _late(stream: Stream) -> Iterator[str]:
    took_s = stream.ended_s - stream.begun_s
    if stream.ended != "DEADLINE_EXCEEDED" or took_s > DEADLINE_S + LATE_S:
        yield f"a call with {DEADLINE_S:g} s to go ended as {stream.ended} after {took_s:.2f} s"


def _engine_of(server: LocalServer) -> psutil.Process:
    (engine,) = server.process.children()
    return engine


def _kill(process: psutil.Process) -> float:
    """When, by time.monotonic()."""
    process.kill()
    return time.monotonic()


def _wrong(saw: Mapping[str, int]) -> Iterator[str]:
    yield from wrong_in(saw, BROKEN_OFF)
    if saw.get(ANSWERED):
        yield f"{saw[ANSWERED]} streams were over before the kill"


def _refused(meanwhile: Mapping[str, int]) -> Mapping[str, float]:
    return {f"new calls that ended as {how}": count for how, count in meanwhile.items()}


FAULTS = (
    Fault("kill-engine", "kill -9 of the engine's process under 32 streams", engine_is_killed),
    Fault("kill-server", "kill -9 of the server under 32 streams, and a new start", server_is_killed),
    Fault("kill-supervisor", "kill -9 of the supervisor under 32 streams, and a new start", supervisor_is_killed),
    Fault("stop-server", "SIGSTOP of the server under 32 streams, SIGCONT 5 s later", server_is_stopped),
    Fault("stop-engine", "the same to a supervised engine whose steps may take 1 s", engine_is_stopped),
)
