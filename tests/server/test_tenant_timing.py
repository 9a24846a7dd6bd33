"""How long a refusal takes tells nobody whether another tenant has such an adapter.

Calls about two names are timed in turn, and the two samples compared by their ranks (Mann and Whitney): where they come
from one distribution, z is a standard normal variable, and beyond 4 in one of 16,000 runs. The operator, who may know,
is the proof that the test could tell: what this engine has takes it longer to find.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Awaitable, Callable

import grpc
import pytest
from support.fake_engine import finished
from support.grpc_harness import Client, ask_once, read_all, served
from support.tenants import OPERATOR, OWN, THEIRS, Metadata, as_, bearing, furnish, two_tenants

from gralora.v1 import adapters_pb2, generation_pb2
from gralora_server.tenants.settings import Role

ABSENT = "bob/absent"
LOOKUP_S = 0.001
PAIRS, WARM_UP = 300, 20
MAX_Z = 4.0

CALLS: dict[str, Callable[[Client, str, Metadata], Awaitable[object]]] = {
    "Generate": lambda c, n, m: c.generation.Generate(ask_once("", adapter=n), metadata=m),
    "StreamGenerate": lambda c, n, m: read_all(
        c.generation.StreamGenerate(generation_pb2.StreamGenerateRequest(adapter=n, text="hello"), metadata=m)
    ),
    "GetAdapter": lambda c, n, m: c.adapters.GetAdapter(adapters_pb2.GetAdapterRequest(name=n), metadata=m),
    "PinAdapter": lambda c, n, m: c.adapters.PinAdapter(adapters_pb2.PinAdapterRequest(name=n), metadata=m),
}


async def elapsed_s(call: Awaitable[object]) -> float:
    started_s = time.perf_counter()
    try:
        await call
    except grpc.aio.AioRpcError as error:
        assert error.code() is grpc.StatusCode.NOT_FOUND  # noqa: PT017  # an operator's call may succeed
    return time.perf_counter() - started_s


def rank_z(one: list[float], other: list[float]) -> float:
    """Above 0 where `one` tends to be larger."""
    ordered = sorted((value, index < len(one)) for index, value in enumerate([*one, *other]))
    of_one = sum(rank for rank, (_, is_one) in enumerate(ordered, 1) if is_one)
    expected = len(one) * (len(ordered) + 1) / 2
    return (of_one - expected) / math.sqrt(len(one) * len(other) * (len(ordered) + 1) / 12)


async def compared(method: str, metadata: Metadata) -> float:
    samples: dict[str, list[float]] = {THEIRS: [], ABSENT: []}
    order = random.Random(method)
    async with served(tenancy=two_tenants()) as s:
        furnish(s, OWN, THEIRS)
        s.engine.adapters.lookup_s = LOOKUP_S
        s.engine.script = [finished()]
        for pair in range(WARM_UP + PAIRS):
            for name in order.sample((THEIRS, ABSENT), 2):
                took_s = await elapsed_s(CALLS[method](s.client, name, metadata))
                if pair >= WARM_UP:
                    samples[name].append(took_s)
    return rank_z(samples[THEIRS], samples[ABSENT])


@pytest.mark.alone
@pytest.mark.parametrize("method", CALLS)
async def test_the_time_of_a_refusal_tells_nothing(method: str) -> None:
    to_operator = await compared(method, bearing(OPERATOR))
    to_tenant = await compared(method, as_("acme", Role.MANAGE))

    assert to_operator > MAX_Z
    assert abs(to_tenant) < MAX_Z
