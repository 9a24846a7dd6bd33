"""Streams that end at any moment leave nothing behind."""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor

from gralora_server import Client
from gralora_server.client import DeadlineError, ResourceExhaustedError

from .conftest import assert_idle

NUM_STREAMS = 32


def test_32_streams_each_cancelled_at_a_random_moment_leave_no_page_lease_or_queue_entry(client: Client) -> None:
    rng = random.Random(0)
    barrier = threading.Barrier(NUM_STREAMS)

    def stream_and_leave(index: int, leave_after: int) -> int:
        barrier.wait()
        seen = 0
        prompt = [3 + (index + position) % 200 for position in range(1 + 11 * index % 97)]
        with client.stream(
            token_ids=prompt, adapter=["", "a0", "a1", "a2"][index % 4], max_tokens=300, ignore_eos=True
        ) as stream:
            if leave_after == 0:
                return 0  # before the first message
            for delta in stream:
                seen += len(delta.token_ids)
                if seen >= leave_after:
                    break
        return seen

    with ThreadPoolExecutor(NUM_STREAMS) as pool:
        seen = list(pool.map(stream_and_leave, range(NUM_STREAMS), [rng.randrange(120) for _ in range(NUM_STREAMS)]))

    assert sum(seen) > 0
    assert_idle(client)
    assert client.generate("still here?", max_tokens=4, ignore_eos=True).usage.output_tokens == 4


def test_calls_that_time_out_leave_nothing_either(client: Client) -> None:
    def call(index: int) -> str:
        try:
            timeout_s = 0.01 * (index % 5 + 1)
            late = client.generate("long", adapter="a0", max_tokens=400, ignore_eos=True, timeout_s=timeout_s)
        except DeadlineError:
            return "deadline"
        except ResourceExhaustedError as error:
            return error.reason  # it was known that there is not enough time
        return late.finish_reason.value  # the server was a moment quicker than the client's own clock

    with ThreadPoolExecutor(16) as pool:
        outcomes = set(pool.map(call, range(32)))

    assert "deadline" in outcomes
    assert outcomes <= {"deadline", "TOO_LATE"}
    assert_idle(client)
