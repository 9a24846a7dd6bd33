"""A wall clock that jumps under a running server.

The machine's clock stays as it is: the server's process begins with a prelude in whose world time.time() and
datetime.now() are as far off as a file says. time.monotonic() is untouched, as it is when a
real clock is set; and so are times that the kernel writes to files, which a real jump would move, too.
"""

from __future__ import annotations

import asyncio
import hashlib
import struct
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from benchmarks.catalogue.content import Contents
from benchmarks.faults import prelude
from benchmarks.faults.acknowledged import Acknowledged
from benchmarks.faults.fault import Fault, Outcome
from benchmarks.faults.seen import Seen, until_done
from benchmarks.faults.stage import Stage, Tokens
from gralora_runtime.adapters.checkpoint.tensors import WEIGHTS_FILE
from gralora_server.client import AsyncClient

DAY_S = 86_400.0
EXPIRES_S = DAY_S / 2
STREAMS, LONG = 4, 256  # tokens: the clock jumps while they come
USED, BROKEN, SENT = "a0", "a3", "sent"
BURST = 3  # requests
# Secrets, of at least 16 characters.
OPERATOR, SHORT_LIVED, LIMITED = "the-operators-token", "a-token-of-twelve-hours", "a-token-with-few-requests"

MOVED = """
import datetime, mmap, struct, time, types
import grpc._cython.cygrpc as core

core.time = types.ModuleType("time")  # gRPC compares with C's clock, which stays as it is
vars(core.time).update(vars(time))

real, real_ns, moment = time.time, time.time_ns, datetime.datetime
with open({offset!r}, "rb") as opened:
    memory = mmap.mmap(opened.fileno(), 8, access=mmap.ACCESS_READ)

def offset_s():
    return struct.unpack("d", memory[:8])[0]

class Kind(type):
    def __instancecheck__(cls, value):
        return isinstance(value, moment)

class Moved(moment, metaclass=Kind):
    @classmethod
    def now(cls, tz=None):
        return moment.fromtimestamp(time.time(), tz)

time.time = lambda: real() + offset_s()
time.time_ns = lambda: real_ns() + int(offset_s() * 1e9)
datetime.datetime = Moved
"""


@dataclass(frozen=True, slots=True)
class Clock:
    """The server's."""

    file: Path

    def set(self, offset_s: float) -> None:
        with self.file.open("r+b" if self.file.exists() else "wb") as out:
            out.write(struct.pack("d", offset_s))


def jumps(stage: Stage, by_s: float) -> Outcome:
    clock = Clock(stage.folder / "offset")
    clock.set(0.0)
    environment = prelude.environment(stage.folder / "prelude", MOVED.format(offset=str(clock.file)))
    settings = stage.folder / "gralora.toml"
    settings.write_text(_settings())
    Contents(stage.base).write(len(stage.names), stage.folder / SENT)
    with stage.server("--config", str(settings), environment=environment) as server:
        return asyncio.run(_Jump(stage, server.address, clock, by_s, stage.adapters / BROKEN / WEIGHTS_FILE).run())


@dataclass(frozen=True, slots=True)
class _Jump:
    stage: Stage
    address: str
    clock: Clock
    by_s: float
    weights: Path  # of an adapter that is broken while the clock jumps
    seen: Seen = field(default_factory=Seen)
    told: Acknowledged = field(default_factory=Acknowledged)

    async def run(self) -> Outcome:
        async with AsyncClient(self.address, token=OPERATOR) as client:
            whole = self.weights.read_bytes()
            self.weights.write_bytes(whole[: len(whole) // 2])
            await self._before(client)
            recovered_s = await self._under_streams(client)
            await self._tenants()
            self.weights.write_bytes(whole)
            mended_s = time.monotonic()
            await until_done(lambda: self.stage.answer(client, BROKEN))
            figures = {"until a mended adapter answers, s": round(time.monotonic() - mended_s, 3)}
            lost = await self.told.lost(self.stage, client)
        seen = self.seen
        return Outcome(saw=dict(seen.saw), recovered_s=recovered_s, lost=lost, problems=seen.problems, figures=figures)

    async def _before(self, client: AsyncClient) -> None:
        for name in set(self.stage.names) - {BROKEN}:
            self.told.answers[name] = await self.stage.answer(client, name)
        await self.told.push(self.stage, client, SENT)
        await self.seen.refusal(BROKEN, self.stage.answer(client, BROKEN))
        async with AsyncClient(self.address, token=LIMITED) as limited:
            for _ in range(BURST):
                await self.seen.call("a request of the quota", self.stage.answer(limited, USED), self._right)

    async def _under_streams(self, client: AsyncClient) -> float:
        long = await self.stage.answer(client, USED, max_tokens=LONG)
        calls = (self.stage.answer(client, USED, max_tokens=LONG) for _ in range(STREAMS))
        streams = [asyncio.create_task(self.seen.call("a stream", call, long)) for call in calls]
        while (await client.load()).running < STREAMS:  # noqa: ASYNC110  # of another process
            await asyncio.sleep(0)
        self.clock.set(self.by_s)
        jumped_s = time.monotonic()
        await asyncio.gather(*streams)
        return await self.stage.recovered_s(client, self.told.answers, jumped_s)

    async def _tenants(self) -> None:
        """Quotas do not follow the wall clock, and tokens do: forth, and back again."""
        async with AsyncClient(self.address, token=LIMITED) as limited:
            await self.seen.refusal("a request beyond the quota", self.stage.answer(limited, USED))
        async with AsyncClient(self.address, token=SHORT_LIVED) as short:
            if self.by_s > EXPIRES_S:
                await self.seen.refusal("a token that is out of date", self.stage.answer(short, USED))
                self.clock.set(0.0)
            await self.seen.call("a token in its time", self.stage.answer(short, USED), self._right)

    @property
    def _right(self) -> Tokens:
        return self.told.answers[USED]


def _settings() -> str:
    """An operator, a tenant whose token lives for half a day, and one with few requests."""
    expires = datetime.now(UTC) + timedelta(seconds=EXPIRES_S)
    return f"""
public_adapters = ["*"]
[[admin_tokens]]
sha256 = "{_digest(OPERATOR)}"
[tenants.short]
limits = {{ requests_per_s = 1000 }}
tokens = [{{ sha256 = "{_digest(SHORT_LIVED)}", expires = {expires.isoformat()} }}]
[tenants.limited]
limits = {{ requests_per_s = 0.001, burst_s = {BURST / 0.001} }}
tokens = [{{ sha256 = "{_digest(LIMITED)}" }}]
"""


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


FAULTS = (
    Fault("clock-forward", "the wall clock jumps a day forward", lambda stage: jumps(stage, DAY_S)),
    Fault("clock-back", "the wall clock jumps a day back", lambda stage: jumps(stage, -DAY_S)),
)
