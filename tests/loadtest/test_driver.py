"""The driver against a server whose delays are known: what it measures is what the server did."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from benchmarks.fake_server import VOCAB_SIZE, FakeServer
from gralora_server.client.connection import Connection
from gralora_server.loadtest import driver as driver_module
from gralora_server.loadtest import summary as summary_module
from gralora_server.loadtest.driver import UNFINISHED, Driver, DriverResult
from gralora_server.loadtest.patience import Patience
from gralora_server.loadtest.record import OK
from gralora_server.loadtest.summary import Slo, Window, gaps_s, generator_health, percentile, summarise
from gralora_server.loadtest.trace import Trace, TraceRequest


def request(arrival_s: float, adapter: str, output_tokens: int = 1, seed: int = 0, tenant: str = "") -> TraceRequest:
    fields = {"adapter": adapter, "output_tokens": output_tokens, "seed": seed, "tenant": tenant}
    return TraceRequest(arrival_s=arrival_s, prompt_tokens=3, **fields)


def make_trace(requests: Sequence[TraceRequest], *, warmup_s: float = 0.0, duration_s: float = 1.0, **more) -> Trace:
    return Trace(requests=tuple(requests), warmup_s=warmup_s, duration_s=duration_s, **more)


@dataclass
class Driven:
    server: FakeServer
    driver: Driver
    result: DriverResult


def drive(trace: Trace, **options) -> Driven:
    async def run() -> Driven:
        fake = FakeServer()
        server, port = await fake.start()
        driver = Driver(Connection(target=f"127.0.0.1:{port}", max_attempts=1), VOCAB_SIZE, **options)
        result = await driver.run(trace)
        await server.stop(None)
        return Driven(fake, driver, result)

    return asyncio.run(run())


@pytest.mark.alone
def test_percentiles_are_those_of_the_server() -> None:
    """Within 2 %, of what the server noted when its messages left: a timer may be late, and on a busy machine it is."""
    mix = [0.2 + 0.01 * ((37 * i) % 100) for i in range(100)]  # each of 0.20, 0.21, ... 1.19 once
    trace = make_trace([request(0.02 * i, f"ttft={ttft:.3f},itl=0.05", 3) for i, ttft in enumerate(mix)], duration_s=2)

    driven = drive(trace)

    start_s = driven.driver.start_s
    due = [request.arrival_s + start_s for request in trace.requests]
    came_in_order = sorted(driven.server.sent_s)
    true_ttft = sorted(left[0] - due_s for due_s, (_, left) in zip(due, came_in_order, strict=True))
    true_e2e = sorted(left[-1] - due_s for due_s, (_, left) in zip(due, came_in_order, strict=True))
    true_itl = sorted(later - earlier for _, left in came_in_order for earlier, later in itertools.pairwise(left))
    summary = summarise(
        "fake",
        driven.result.records,
        window=Window(0, 2),
        slo=Slo(),
        generator=generator_health(driven.result.records, driven.result.wake_lags_s, driven.result.cpu_share),
    )
    for p in (50, 90, 95, 99):
        assert getattr(summary.ttft_s, f"p{p}") == pytest.approx(percentile(true_ttft, p), rel=0.02)
        assert getattr(summary.e2e_s, f"p{p}") == pytest.approx(percentile(true_e2e, p), rel=0.02)
    assert summary.itl_s.mean == pytest.approx(sum(true_itl) / len(true_itl), rel=0.02)
    assert summary.ttft_s.p50 > 0.69  # the mix says 0.7: what the server noted is no less than it was told to wait
    assert summary.ok == summary.requests == 100
    assert summary.queue_s.p50 == 0.125


def test_an_open_loop_does_not_wait_for_answers() -> None:
    driven = drive(make_trace([request(0.05 * i, "ttft=0.5") for i in range(10)]))

    assert driven.server.most_running >= 8


def test_a_closed_loop_has_so_many_clients_and_stops_sending_at_the_end() -> None:
    trace = make_trace([request(0, "ttft=0.05") for _ in range(1000)], duration_s=0.5, concurrency=3)

    driven = drive(trace)

    assert driven.server.most_running == 3
    assert len(driven.result.records) < 40
    assert all(record.intended_s < 0.5 for record in driven.result.records)


def test_a_closed_loop_begins_anew_with_other_prompts() -> None:
    """Requests that ran out would look like a server that stopped answering."""
    trace = make_trace([request(0, "ttft=0.01", seed=100 * i) for i in range(5)], duration_s=0.5, concurrency=2)

    driven = drive(trace)

    assert len(driven.result.records) > 10
    assert len(set(driven.server.prompts)) == len(driven.server.prompts) == len(driven.result.records)


def test_delays_count_from_when_a_request_was_due() -> None:
    """No coordinated omission: a generator that is held up reports the delay, and that it was held up."""

    def hold_up(_: object) -> None:
        if not held:
            held.append(True)
            time.sleep(0.4)

    held: list[bool] = []
    trace = make_trace([request(0.02 * i, "") for i in range(30)])

    driven = drive(trace, on_progress=hold_up)

    worst = max(driven.result.records, key=lambda record: record.send_lag_s)
    assert worst.send_lag_s > 0.2
    assert worst.ttft_s is not None
    assert worst.ttft_s > worst.send_lag_s
    assert generator_health(driven.result.records, driven.result.wake_lags_s, cpu_share=0.1).limited


def test_a_generator_with_time_to_spare_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(summary_module, "LATE_S", 0.5)  # others may use the machine while this runs
    driven = drive(make_trace([request(0.05 * i, "") for i in range(20)]))

    assert not generator_health(driven.result.records, driven.result.wake_lags_s, cpu_share=0.1).limited
    assert generator_health(driven.result.records, driven.result.wake_lags_s, cpu_share=1.2).limited


def test_failures_are_records_with_their_status() -> None:
    trace = make_trace([request(0, "fail=RESOURCE_EXHAUSTED"), request(0, ""), request(0.1, "fail=NOT_FOUND")])

    driven = drive(trace)

    assert sorted(record.status for record in driven.result.records) == ["NOT_FOUND", OK, "RESOURCE_EXHAUSTED"]
    assert driven.driver.progress().failed == 2


def test_who_is_refused_comes_again_exactly_when_told() -> None:
    driven = drive(make_trace([request(0, "refuse=2,retry=0.15", 3)]), patience=Patience(retries=5))

    (record,) = driven.result.records
    first, second, third = record.tries
    assert [(one.status, one.reason, one.retry_s) for one in record.tries] == [
        ("RESOURCE_EXHAUSTED", "QUEUE_FULL", 0.15),
        ("RESOURCE_EXHAUSTED", "QUEUE_FULL", 0.15),
        (OK, "", None),
    ]
    assert second.sent_s >= first.ended_s + 0.15
    assert third.sent_s >= second.ended_s + 0.15
    assert (record.status, record.num_tokens, record.refused) == (OK, 3, False)
    assert record.refusals == (first, second)
    assert record.sent_s == first.sent_s  # its delays count from the first time
    assert (driven.driver.progress().sent, driven.driver.progress().failed) == (1, 0)


def test_who_may_not_come_again_stays_refused() -> None:
    adapter = "refuse=2,retry=0.05"

    for patience, tries in ((Patience(), 1), (Patience(retries=1), 2), (Patience(retries=9, total_s=0.04), 1)):
        (record,) = drive(make_trace([request(0, adapter)]), patience=patience).result.records
        assert len(record.tries) == tries
        assert record.refused
        assert record.status == "RESOURCE_EXHAUSTED"


def test_what_was_not_told_to_come_again_does_not() -> None:
    driven = drive(make_trace([request(0, "fail=RESOURCE_EXHAUSTED")]), patience=Patience(retries=3))

    (record,) = driven.result.records
    assert len(record.tries) == 1
    assert not record.refused


def test_who_would_come_again_after_the_end_of_the_run_does_not() -> None:
    trace = make_trace([request(0, "refuse=1,retry=60")], duration_s=0.2)

    driven = drive(trace, drain_s=0.1, patience=Patience(retries=1))

    (record,) = driven.result.records
    assert record.refused
    assert record.status == "RESOURCE_EXHAUSTED"


def test_each_try_has_the_whole_deadline() -> None:
    trace = make_trace([request(0, "refuse=1,retry=1.0"), request(0, "ttft=60")])

    driven = drive(trace, patience=Patience(deadline_s=2.0, retries=1))

    assert sorted(record.status for record in driven.result.records) == ["DEADLINE_EXCEEDED", OK]
    assert len(driven.server.timeouts_s) == 3
    # Not what a second before has left of it.
    assert all(left_s is not None and 1.1 < left_s <= 2.1 for left_s in driven.server.timeouts_s)
    assert driven.server.running == 0


def test_tenants_show_their_tokens() -> None:
    trace = make_trace([request(0.2 * i, "", tenant=tenant) for i, tenant in enumerate(("a", "b", ""))])

    driven = drive(trace, tokens={"a": "secret-a", "b": "secret-b"})

    assert driven.server.tokens == ["Bearer secret-a", "Bearer secret-b", ""]
    assert [(record.tenant, record.prompt_tokens) for record in driven.result.records] == [("a", 3), ("b", 3), ("", 3)]


def test_what_does_not_end_is_cancelled_and_counted() -> None:
    trace = make_trace([request(0, "ttft=60"), request(0, "itl=0.1", 1000)], duration_s=0.2)

    driven = drive(trace, drain_s=0.2)

    assert [record.status for record in driven.result.records] == [UNFINISHED, UNFINISHED]
    assert driven.server.running == 0


def test_an_answer_of_the_wrong_length_is_an_error() -> None:
    driven = drive(make_trace([request(0, "lose=1", 2), request(0, "", 2)]))

    assert sorted(record.status for record in driven.result.records) == [OK, "WRONG_LENGTH"]


def test_requests_of_the_warm_up_are_sent_but_not_counted() -> None:
    trace = make_trace([request(0.0, ""), request(0.1, ""), request(0.3, "")], warmup_s=0.2)

    driven = drive(trace)

    assert [record.counted for record in sorted(driven.result.records, key=lambda one: one.intended_s)] == [
        False,
        False,
        True,
    ]


def test_prompts_are_those_of_the_seeds() -> None:
    requests = [request(0.1 * i, "", seed=i) for i in range(3)]

    driven = drive(make_trace(requests))

    assert driven.server.prompts == [tuple(one.prompt_ids(VOCAB_SIZE)) for one in requests]
    assert len(set(driven.server.prompts)) == 3


def test_counts_are_sampled_each_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver_module, "SAMPLE_S", 0.1)
    trace = make_trace([request(0.05 * i, "itl=0.02", 5) for i in range(10)])

    driven = drive(trace, memory_bytes=lambda: 12345)

    assert len(driven.result.samples) >= 3
    assert {sample.memory_bytes for sample in driven.result.samples[:-1]} == {12345}
    assert driven.result.samples[-1].tokens == sum(len(gaps_s(record)) + 1 for record in driven.result.records) == 50
    assert [one.ended for one in driven.result.samples] == sorted(one.ended for one in driven.result.samples)
