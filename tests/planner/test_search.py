"""The largest rate and number are really the largest, and memory is shared out as the server would."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from gralora_runtime.errors import ConfigError
from gralora_server.loadtest.arrivals import Renewal
from gralora_server.loadtest.summary import Slo
from gralora_server.loadtest.trace import Trace
from gralora_server.loadtest.workload import Lengths, Popularity, Workload
from gralora_server.planner.search import Planner

from .profiles import profile

ADAPTER = 1000


def trace(names: Sequence[str], rate_per_s: float, warmup_s: float, duration_s: float) -> Trace:
    return Workload(
        arrivals=Renewal(rate_per_s, cv=0.0),
        adapters=names,
        popularity=Popularity(),
        prompt=Lengths(21, 21),
        output=Lengths(11, 11),
        duration_s=duration_s,
        warmup_s=warmup_s,
        seed=0,
    ).trace()


PLANNER = Planner(
    profile=profile(),
    mix={"a": ADAPTER},
    trace=trace,
    slo=Slo(ttft_s=0.5, itl_s=1.0),
    slo_share=0.95,
    memory_bytes=1 << 20,
    host_cache_bytes=5000,
    max_adapter_slots=4096,
    request_tokens=32,
)


def test_the_highest_rate_is_where_the_queue_begins_to_grow() -> None:
    """One row: a request takes 30 + 10 * 10 ms, so that 7.7 a second are possible and 7.8 are not."""
    one_row = profile(settings={"max_num_seqs": 1, "max_num_batched_tokens": 64, "page_size": 16})

    found = replace(PLANNER, profile=one_row).highest_rate(4)

    assert found.rate_per_s == pytest.approx(1 / 0.13, rel=0.03)
    assert found.summary.goodput_share >= 0.95


def test_an_objective_that_cannot_be_met_is_no_rate() -> None:
    found = replace(PLANNER, slo=Slo(ttft_s=0.001, itl_s=1.0)).highest_rate(4)

    assert found.rate_per_s == 0


def test_the_largest_number_serves_at_the_highest_rate() -> None:
    rate = PLANNER.highest_rate(1).rate_per_s

    found = PLANNER.most_adapters(rate / 50)

    assert found is not None
    assert found.num_adapters == pytest.approx(50, abs=3)


def test_not_even_one_adapter() -> None:
    assert PLANNER.most_adapters(1000.0) is None


def test_adapters_that_cost_time_lower_the_rate() -> None:
    dear = replace(PLANNER, profile=profile(adapter_byte_s=0.01 / ADAPTER))

    assert dear.highest_rate(4).rate_per_s < 0.8 * PLANNER.highest_rate(4).rate_per_s


def test_all_adapters_are_in_the_pool_while_the_memory_lasts() -> None:
    planned = PLANNER.highest_rate(100)

    assert planned.server.adapter_pool_bytes == 100 * ADAPTER
    kv_bytes = 4 * 32  # four requests of two pages
    assert planned.memory_bytes == 1000 + kv_bytes + 100 * ADAPTER
    assert planned.loads_per_request == 0


def test_beyond_the_memory_the_pool_shares_it_with_the_cache_and_adapters_are_loaded() -> None:
    tight = replace(PLANNER, memory_bytes=20_000, profile=profile(load_byte_s=0.0001))

    planned = tight.highest_rate(100)

    assert planned.server.adapter_pool_bytes == 20_000 - 1000 - 4 * 32 - 5000
    assert planned.memory_bytes <= 20_000
    assert planned.loads_per_request > 0.5
    assert planned.rate_per_s < PLANNER.highest_rate(100).rate_per_s


def test_no_room_for_one_adapter_is_said_with_what_is_needed() -> None:
    with pytest.raises(ConfigError, match=r"the memory is 6500 bytes, but .* need 7128"):
        replace(PLANNER, memory_bytes=6500).highest_rate(100)
