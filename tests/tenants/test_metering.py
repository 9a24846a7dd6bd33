"""What a stream costs that is left at any moment, and what a prompt looks like before it is tokenized."""

from __future__ import annotations

import pytest
from support.fake_engine import finished, token

from gralora.v1 import generation_pb2
from gralora_runtime.errors import QueueFullError, SlowConsumerError
from gralora_runtime.request import Delta, Started
from gralora_runtime.stream import RequestStream
from gralora_server.tenants.caller import Caller
from gralora_server.tenants.metering import Metering, estimated_tokens
from gralora_server.tenants.quotas import Quotas
from gralora_server.tenants.settings import Role
from gralora_server.tenants.usage import Counts, Usage, UsageRow

ACME = Caller("acme", Role.GENERATE)
STARTED = Delta(
    started=Started(
        prompt_tokens=30, cached_tokens=10, queue_time_s=0.0, seed=0, adapter="org/poet", adapter_digest="a" * 64
    )
)


def everything(usage: Usage) -> list[UsageRow]:
    return usage.rows(tenant=None, first=("", ""), limit=10)


def new_stream(aborted: list[str]) -> RequestStream:
    stream = RequestStream("r1", aborted.append)
    stream.served_by = "org/poet@main@3"
    return stream


@pytest.mark.parametrize("num_read", [0, 1, 3])
async def test_what_is_unread_when_a_stream_is_left_was_used_all_the_same(num_read: int) -> None:
    usage, aborted = Usage(), []
    stream = new_stream(aborted)
    with Metering(Quotas(), usage).admit(ACME, generation_pb2.GenerateRequest(text="hi", adapter="org/poet")) as meter:
        metered = meter.take_on(stream)
        for number, delta in enumerate((STARTED, token(1), token(2))):
            stream.put(delta)
            if number < num_read:
                await anext(metered)
        await metered.aclose()
        stream.put(token(3))  # nobody has that
        await metered.aclose()

    assert aborted == ["r1"]
    assert everything(usage) == [UsageRow("acme", "org/poet@main", Counts(1, 30, 10, 2))]


async def test_a_mix_counts_under_the_names_of_its_adapters_alone() -> None:
    """Weights are anybody's to think of: rows are bounded, and whoever is refused finds the one of those served."""
    usage, stream = Usage(), new_stream([])
    stream.served_by = "org/poet@main@3*0.5+pirate@1"
    wire = generation_pb2.GenerateRequest(text="hi", adapters=[{"name": "pirate"}, {"name": "org/poet@main"}])
    metering = Metering(Quotas(), usage)
    with metering.admit(ACME, wire) as meter:
        metered = meter.take_on(stream)
        stream.put(STARTED)
        await metered.aclose()
    with pytest.raises(QueueFullError), metering.admit(ACME, wire):
        raise QueueFullError("too many wait", 1.0)

    assert everything(usage) == [UsageRow("acme", "org/poet@main+pirate", Counts(1, 30, 10, refused=1))]


async def test_a_stream_that_ended_by_itself_costs_what_it_said() -> None:
    usage, aborted = Usage(), []
    stream = new_stream(aborted)
    with Metering(Quotas(), usage).admit(ACME, generation_pb2.GenerateRequest(text="hi")) as meter:
        metered = meter.take_on(stream)
        for delta in (STARTED, token(1), finished(output_tokens=1)):
            stream.put(delta)
        deltas = [delta async for delta in metered]
        await metered.aclose()

    assert (len(deltas), aborted) == (1, [])  # they had waited, and are one
    assert everything(usage) == [UsageRow("acme", "org/poet@main", Counts(1, 30, 10, 1))]


async def test_what_ended_a_stream_does_not_come_out_of_leaving_it() -> None:
    usage = Usage()
    stream = new_stream([])
    with Metering(Quotas(), usage).admit(ACME, generation_pb2.GenerateRequest(text="hi")) as meter:
        metered = meter.take_on(stream)
        stream.put(STARTED)
        stream.fail(SlowConsumerError("r1", 1))
        await metered.aclose()

    assert everything(usage) == [UsageRow("acme", "org/poet@main", Counts(1, 30, 10))]


@pytest.mark.parametrize(
    ("prompt", "num_tokens"),
    [
        ({"text": ""}, 0),
        ({"text": "x"}, 1),
        ({"text": "x" * 4001}, 1001),
        ({"token_ids": {"ids": [5] * 7}}, 7),
        ({"messages": {"messages": [{"role": "user", "content": "x" * 6}] * 2}}, 3),
        ({}, 0),
    ],
)
def test_a_prompt_is_estimated_by_its_length(prompt: dict[str, object], num_tokens: int) -> None:
    assert estimated_tokens(generation_pb2.GenerateRequest(**prompt)) == num_tokens
