"""Records to figures, by hand-made records whose figures are known."""

from __future__ import annotations

import pytest

from gralora_runtime.errors import ConfigError
from gralora_server.loadtest.record import OK, RequestRecord
from gralora_server.loadtest.result import LoadTestResult, RunResult
from gralora_server.loadtest.summary import (
    Distribution,
    Slo,
    Summary,
    Window,
    fairness,
    generator_health,
    percentile,
    summarise,
)


def record(
    *, adapter: str = "a", at: float = 0.0, sent: float | None = None, ttft: float = 0.5, tokens: int = 5,
    itl: float = 0.1, status: str = OK, counted: bool = True,
) -> RequestRecord:  # fmt: skip
    times = tuple(at + ttft + i * itl for i in range(tokens))
    return RequestRecord(
        adapter=adapter,
        intended_s=at,
        sent_s=at if sent is None else sent,
        token_times_s=times,
        finished_s=times[-1] if times else at + ttft,
        status=status,
        counted=counted,
    )


def summary_of(records: list[RequestRecord], window: Window | None = None, slo: Slo | None = None) -> Summary:
    health = generator_health(records, [0.001], cpu_share=0.2)
    return summarise("x", records, window=window or Window(0, 10), slo=slo or Slo(), generator=health)


def test_percentiles_are_nearest_rank() -> None:
    values = [float(i) for i in range(1, 101)]

    assert [percentile(values, p) for p in (50, 90, 99, 100)] == [50, 90, 99, 100]
    assert percentile([3.0], 50) == 3.0
    assert percentile([], 99) == 0.0


def test_rates_count_what_happened_in_the_window() -> None:
    """A token before the warm-up's end or after the run's end is nobody's throughput, whoever's request it is."""
    before = record(at=0.0, ttft=1.0, tokens=3, itl=1.0, counted=False)  # at 1, 2, 3
    inside = record(at=2.5, ttft=0.5, tokens=2, itl=1.0)  # at 3, 4
    after = record(at=5.0, ttft=0.5, tokens=3, itl=1.0)  # at 5.5, 6.5, 7.5

    summary = summary_of([before, inside, after], Window(2, 6))

    assert summary.tokens == 2 + 2 + 1
    assert summary.tokens_per_s == 5 / 4
    assert summary.requests_per_s == 2 / 4
    assert summary.requests == summary.ok == 2  # of those that are counted
    assert summary.ttft_s.p50 == pytest.approx(0.5)
    assert summary.duration_s == 4


def test_goodput_needs_both_delays() -> None:
    slo = Slo(ttft_s=0.5, itl_s=0.1)
    good, late = record(ttft=0.4, itl=0.05), record(ttft=0.6, itl=0.05)
    slow, single = record(ttft=0.4, itl=0.2), record(ttft=0.4, tokens=1)
    failed = record(ttft=0.1, status="UNAVAILABLE")

    summary = summary_of([good, late, slow, single, failed], slo=slo)

    assert summary.goodput_share == 2 / 5
    assert summary.goodput_per_s == 2 / 10
    assert summary.errors == {"UNAVAILABLE": 1}


def test_failed_requests_have_no_delays_but_are_not_forgotten() -> None:
    summary = summary_of([record(), record(status="NOT_FOUND", tokens=0, ttft=60)])

    assert summary.e2e_s.count == 1
    assert (summary.requests, summary.ok) == (2, 1)


def test_fairness_is_of_service_and_not_of_popularity() -> None:
    same = [record(adapter="busy") for _ in range(9)] + [record(adapter="rare")]
    unequal = [record(adapter="x", ttft=0.1, itl=0.1), record(adapter="y", ttft=0.9, itl=0.9)]

    assert fairness(same).jain == pytest.approx(1.0)
    assert fairness(same).max_over_min == pytest.approx(1.0)
    assert fairness(unequal).max_over_min == pytest.approx(9.0)
    assert fairness(unequal).jain == pytest.approx((1 + 9) ** 2 / (2 * (1 + 81)))


def test_who_got_nothing_makes_the_ratio_unknown() -> None:
    found = fairness([record(adapter="x"), record(adapter="y", status="CANCELLED")])

    assert found.max_over_min is None
    assert found.jain == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("sent", "wake", "cpu", "limited"),
    [(0.0, 0.0, 0.1, False), (0.2, 0.0, 0.1, True), (0.0, 0.2, 0.1, True), (0.0, 0.0, 0.95, True)],
)
def test_the_generator_says_when_it_was_the_bottleneck(sent: float, wake: float, cpu: float, limited: bool) -> None:
    assert generator_health([record(sent=sent)], [wake], cpu).limited is limited


def test_only_the_busiest_adapters_are_listed() -> None:
    records = [record(adapter=f"{i:05}") for i in range(10_000)] + [record(adapter="09999")]

    summary = summary_of(records)

    assert len(summary.adapters) == 100
    assert next(iter(summary.adapters)) == "09999"
    assert summary.adapters["09999"].requests == 2
    assert summary.fairness.adapters == 10_000


def make_result() -> LoadTestResult:
    run = RunResult(system="server", num_adapters=1, summary=summary_of([record()]), timeline=())
    return LoadTestResult(title="t", made_at="now", machine={"CPU": "x"}, workload={}, runs=(run,))


def test_a_result_is_read_as_it_was_written(tmp_path) -> None:
    make_result().write(tmp_path / "result.json")

    assert LoadTestResult.read(tmp_path / "result.json") == make_result()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{}", "title: Field required"),
        ("no", "Invalid JSON"),
        ('{"title": 3}', "title: Input should be a valid string"),
    ],
)
def test_what_is_no_result_is_refused(tmp_path, text: str, problem: str) -> None:
    path = tmp_path / "result.json"
    path.write_text(text)

    with pytest.raises(ConfigError, match=problem):
        LoadTestResult.read(path)


def test_a_distribution_of_nothing() -> None:
    assert Distribution.of([]).count == 0
    assert Distribution.of([]).p99 == 0.0
