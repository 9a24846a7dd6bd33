"""What tenants got under overload, by hand-made records whose figures are known."""

from __future__ import annotations

import pytest

from gralora_server.loadtest.overload import Overload, overload, served_at
from gralora_server.loadtest.patience import Patience
from gralora_server.loadtest.record import OK, RequestRecord, Try
from gralora_server.loadtest.recovery import recovery
from gralora_server.loadtest.summary import Slo, Window

WINDOW = Window(0, 10)


def record(
    *refusals: Try, tenant: str = "a", at: float = 0.0, ttft: float = 0.5, tokens: int = 5, status: str = OK,
    counted: bool = True, prompt: int = 10,
) -> RequestRecord:  # fmt: skip
    """Let in at once, or as the last of `refusals` told; `ttft` is from then."""
    sent_s = refusals[-1].ended_s + (refusals[-1].retry_s or 0.0) if refusals else at
    times = tuple(sent_s + ttft + 0.1 * i for i in range(tokens))
    last = Try(sent_s=sent_s, ended_s=times[-1] if times else sent_s + ttft, status=status)
    return of_tries((*refusals, last), times, tenant=tenant, at=at, counted=counted, prompt=prompt)


def turned_away(*refusals: Try) -> RequestRecord:
    """Never let in."""
    return of_tries(refusals, (), tenant="a", at=refusals[0].sent_s, counted=True, prompt=10)


def of_tries(
    tries: tuple[Try, ...], times: tuple[float, ...], *, tenant: str, at: float, counted: bool, prompt: int
) -> RequestRecord:
    return RequestRecord(
        adapter="x",
        intended_s=at,
        sent_s=tries[0].sent_s,
        token_times_s=times,
        finished_s=tries[-1].ended_s,
        status=tries[-1].status,
        counted=counted,
        tenant=tenant,
        prompt_tokens=prompt,
        tries=tries,
    )


def refused(at: float, retry: float, *, after: float = 0.01, reason: str = "TOO_LATE") -> Try:
    return Try(sent_s=at, ended_s=at + after, status="RESOURCE_EXHAUSTED", reason=reason, retry_s=retry)


def overload_of(records: list[RequestRecord], **options) -> Overload:
    settings = {"window": WINDOW, "slo": Slo(ttft_s=1.0), "patience": Patience(), "weights": {}, "peak": None}
    return overload(records, **(settings | options))


def test_every_request_ends_in_one_way() -> None:
    records = [
        record(),
        record(ttft=1.5),
        turned_away(refused(0, 1.0)),
        turned_away(refused(0, 1.0, reason="QUEUE_FULL")),
        turned_away(refused(0, 1.0), refused(1.5, 1.0, reason="QUEUE_FULL")),
        record(status="DEADLINE_EXCEEDED", tokens=0),
        record(status="INTERNAL", tokens=0),
        record(counted=False),
    ]

    total = overload_of(records).total

    assert (total.in_time, total.late) == (1, 1)
    assert total.refused == {"TOO_LATE": 1, "QUEUE_FULL": 2}
    assert (total.deadline_exceeded, total.errors) == (1, {"INTERNAL": 1})
    ends = total.in_time + total.late + sum(total.refused.values()) + total.deadline_exceeded + 1
    assert ends == total.requests == 7
    assert total.tries == 8
    assert total.refusals == {"TOO_LATE": 2, "QUEUE_FULL": 2}
    assert total.refusal_s.p99 == pytest.approx(0.01)
    assert total.told_s.max == 1.0


def test_a_deadline_is_part_of_the_objective() -> None:
    quick, long = record(tokens=5), record(tokens=20)  # 0.9 and 2.4 s

    assert overload_of([quick, long]).total.in_time == 2
    assert overload_of([quick, long], patience=Patience(deadline_s=1.0)).total.in_time == 1


def test_goodput_counts_what_ended_in_time_and_in_the_window() -> None:
    records = [record(at=1.0), record(at=9.5), record(at=2.0, ttft=2.0), record(at=3.0, tokens=7)]

    total = overload_of(records).total

    assert total.good_requests_per_s == 2 / 10
    assert total.good_tokens_per_s == 12 / 10


def test_waits_count_from_when_a_request_was_due_or_from_when_it_was_let_in() -> None:
    found = overload_of([record(refused(0.0, 3.0))]).total

    assert (found.in_time, found.late, found.in_time_once_let_in) == (0, 1, 1)
    assert found.ttft_s.p50 == pytest.approx(3.51)


def test_how_right_retry_times_were() -> None:
    at_once = [record(refused(0.0, 2.0)) for _ in range(2)]
    later = record(refused(0.0, 1.0), refused(1.01, 0.99), refused(2.01, 0.99))  # 3 s after 1 s was told
    never = turned_away(refused(0.0, 1.0), refused(1.01, 1.0))
    gone = turned_away(refused(0.0, 1.0))

    found = overload_of([*at_once, later, never, gone]).total.retries

    assert (found.came_again, found.let_in, found.at_first_retry) == (4, 3, 2)
    assert (found.wait_p25, found.wait_p50, found.wait_p75) == pytest.approx((1.0, 1.0, 3.0))


def test_the_first_refusal_may_be_in_the_warm_up() -> None:
    early, late = record(refused(1.0, 1.0), at=1.0, counted=False), turned_away(refused(5.0, 1.0))

    assert overload_of([late, early]).total.first_refusal_s == pytest.approx(1.01)
    assert overload_of([record()]).total.first_refusal_s is None


def test_what_was_served_is_prompts_and_answers_at_their_prices() -> None:
    short = record(prompt=10, tokens=5)
    ended_late = record(at=9.0, ttft=0.95, prompt=100, tokens=5)  # its prompt and one token are of the window
    nothing = record(prompt=1000, tokens=0, status="INTERNAL")

    assert sum(amount for _, amount in served_at(short)) == 10 + 2 * 5
    assert served_at(nothing) == []
    assert overload_of([short, ended_late, nothing]).total.served == 20 + 100 + 2


def test_fairness_is_of_what_tenants_were_served_by_their_weights() -> None:
    heavy = [record(tenant="heavy") for _ in range(4)]
    light = [record(tenant="light")]

    assert overload_of([*heavy, *light], weights={"heavy": 4.0}).jain == pytest.approx(1.0)
    assert overload_of([*heavy, *light]).jain == pytest.approx(25 / 34)
    found = overload_of([*heavy, *light]).tenants
    assert list(found) == ["heavy", "light"]
    assert found["heavy"].served == 4 * found["light"].served == found["heavy"].served_per_s * 10


def test_who_belongs_to_no_tenant_is_only_in_the_total() -> None:
    found = overload_of([record(tenant=""), record(tenant="")])

    assert found.tenants == {}
    assert found.jain is None
    assert found.total.requests == 2


def test_bins_are_of_the_whole_run_and_lose_nothing() -> None:
    records = [
        record(tenant="a", at=0.2, counted=False),
        record(tenant="b", at=1.7),
        record(tenant="b", at=2.0, ttft=1.5),
        turned_away(refused(3.0, 1.0), refused(4.01, 1.0)),
    ]

    found = overload_of(records, window=Window(1, 6))

    assert found.bin_s == 1.0
    assert [one.at_s for one in found.bins] == [0, 1, 2, 3, 4, 5]
    assert [one.good for one in found.bins] == [0, 1, 1, 0, 0, 0]  # at 1.1 and at 2.6
    assert [one.refusals for one in found.bins] == [0, 0, 0, 1, 1, 0]
    assert [one.ttft_p99_s for one in found.bins] == pytest.approx([0.5, 0.5, 1.5, None, None, None])
    assert sum(one.served["b"] for one in found.bins) == 40
    assert found.bins[0].served == {"a": 10 + 2 * 3, "b": 0}  # at 0.7 and with the two tokens after it


def test_long_runs_have_longer_bins() -> None:
    found = overload_of([record()], window=Window(0, 3600))

    assert found.bin_s == 12.0
    assert len(found.bins) == 300


def steady(start: int, end: int, ttft: float) -> list[RequestRecord]:
    """Ten a second."""
    return [record(at=start + i / 10, ttft=ttft) for i in range(10 * (end - start))]


def test_service_is_normal_again_from_the_first_second_after_which_it_stays_so() -> None:
    late, fine = steady(40, 43, 3.0), steady(43, 60, 0.7)
    records = [*steady(0, 20, 0.5), *steady(20, 40, 5.0), *late, *fine]

    found = recovery(records, Window(5, 60), 20.0, 40.0)

    assert (found.from_s, found.to_s) == (20.0, 40.0)
    assert found.before_p99_s == pytest.approx(0.5)
    assert (found.after_s, found.requests) == (3, len(fine))


def test_a_relapse_is_not_normal() -> None:
    relapse = steady(50, 52, 3.0)
    records = [*steady(0, 20, 0.5), *steady(20, 40, 5.0), *steady(40, 50, 0.5), *relapse, *steady(52, 60, 0.5)]

    assert recovery(records, Window(5, 60), 20.0, 40.0).after_s == 12


def test_who_is_refused_is_not_served_as_before() -> None:
    away = [turned_away(refused(41.0 + i / 10, 1.0)) for i in range(30)]
    before = [*steady(0, 20, 0.5), *steady(20, 40, 5.0)]

    assert recovery([*before, *away, *steady(44, 60, 0.5)], Window(5, 60), 20.0, 40.0).after_s == 4
    never = recovery([*before, *steady(44, 60, 0.8)], Window(5, 60), 20.0, 40.0)
    assert (never.after_s, never.requests) == (None, 0)


def test_without_a_before_nothing_is_said() -> None:
    found = recovery(steady(20, 60, 0.5), Window(5, 60), 20.0, 40.0)

    assert (found.before_p99_s, found.after_s) == (None, None)
