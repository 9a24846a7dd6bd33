"""Processes that are killed or stopped under their clients."""

from __future__ import annotations

import asyncio
import time

from benchmarks.faults.fault import Fault, Outcome
from benchmarks.faults.stage import Stage, counted
from gralora_server.client import AsyncClient
from gralora_server.loadtest.local_server import LocalServer

STREAMS = 32
LONG = 64  # tokens: the kill comes while all of them are under way


def engine_is_killed(stage: Stage) -> Outcome:
    """Under `--supervise`, which starts another."""
    with stage.server("--supervise") as server:
        return asyncio.run(_engine_is_killed(stage, server))


async def _engine_is_killed(stage: Stage, server: LocalServer) -> Outcome:
    names = [stage.names[number % len(stage.names)] for number in range(STREAMS)]
    async with AsyncClient(server.address) as client:
        expected = await stage.answers(client)
        long = {name: await stage.answer(client, name, max_tokens=LONG) for name in stage.names}
        calls = [asyncio.create_task(stage.answer(client, name, max_tokens=LONG)) for name in names]
        while (await client.load()).running < STREAMS // 2:
            await asyncio.sleep(0)
        (engine,) = server.process.children()
        engine.kill()
        killed_s = time.monotonic()
        saw = counted(await asyncio.gather(*calls, return_exceptions=True), [long[name] for name in names])
        recovered_s = await stage.recovered_s(client, expected, killed_s)
    return Outcome(saw=saw, recovered_s=recovered_s)


FAULTS = (Fault("kill-engine", "kill -9 of the engine's process under 32 streams", engine_is_killed),)
