"""What the soak calls wrong. The soak itself, two minutes of it over a tiny model, is part of `.ci/run`."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.catalogue.answers import Answer
from benchmarks.catalogue.base import base_of, save_tiny_llama
from benchmarks.catalogue.churn import Churn
from benchmarks.catalogue.content import Contents
from benchmarks.catalogue.fleet import make_fleet
from benchmarks.soak import health
from benchmarks.soak.bills import Bill, bills, problems_of
from benchmarks.soak.customers import CUSTOMERS, write_configuration
from benchmarks.soak.health import Health
from benchmarks.soak.run import Observed
from benchmarks.soak.traffic import PROMPT_TOKENS, Sent, soak_prompt
from benchmarks.soak.verdict import drift, verdict
from gralora_server.client import TenantUsage
from gralora_server.loadtest.metrics_page import Page
from gralora_server.tenants.ownership import Ownership
from gralora_server.tenants.settings import TenancySettings

TOKENS = (5, 6, 7, 8)
EXPECTED = {(0, "a00000"): (*TOKENS, 9, 10)}
ANSWER = Answer(name="a00000", wanted="", sent_s=10.0, ended_s=11.0, digest="d0", tokens=TOKENS, max_tokens=4)
SENT = Sent(kind="plain", tenant="large", answer=ANSWER, at_least=(9, 4), at_most=(9, 4))
EMPTY = Page({})


@pytest.fixture(scope="module")
def churn(tmp_path_factory: pytest.TempPathFactory) -> Churn:
    folder = tmp_path_factory.mktemp("soak")
    fleet = make_fleet(Contents(base_of("tiny", save_tiny_llama(folder / "model"))), folder, 1)
    churn = Churn(fleet, list(fleet.initial), seed=0)
    churn.contents |= {"d0": 0, "d1": 1}
    return churn


def sample(at_s: float, mebibytes: float) -> Health:
    return Health(at_s, int(mebibytes * 2**20), 30, 20)


def observed(*sent: Sent) -> Observed:
    still = sample(0.0, 500)
    return Observed(
        sent=sent, begun_s=0.0, ended_s=300.0, capacity_per_s=1.0, offered_per_s=0.7, before=still, after=still,
        samples=[still], usage=[], page=EMPTY, left={}, reloads=0,
    )  # fmt: skip


def judged(churn: Churn, one: Sent = SENT, **changes: object) -> str:
    return verdict(replace(one, answer=replace(one.answer, **changes)), churn, EXPECTED)  # type: ignore[arg-type]


def test_an_answer_is_right_as_long_as_it_is_the_beginning_of_its_contents_answer(churn: Churn) -> None:
    assert judged(churn) == "right"
    assert judged(churn, tokens=TOKENS[:2], is_whole=False) == "right"
    assert judged(churn, tokens=TOKENS[:2]) == "wrong"  # it stayed to the end, and some are missing
    assert judged(churn, tokens=(5, 6, 7, 9)) == "wrong"
    assert judged(churn, digest="d1") == "wrong"


def test_an_error_is_meant_only_for_who_has_to_hear_it(churn: Churn) -> None:
    hurried = replace(SENT, meant=frozenset({"TOO_LATE"}))
    invalid = replace(SENT, meant=frozenset({"INVALID_REQUEST"}), must_fail=True)

    assert judged(churn, hurried, error="TOO_LATE") == "error, meant: TOO_LATE"
    assert judged(churn, error="TOO_LATE") == "error, unexpected: TOO_LATE"
    assert judged(churn, hurried, error="DEADLINE_EXCEEDED") == "error, unexpected: DEADLINE_EXCEEDED"
    assert judged(churn, invalid, error="INVALID_REQUEST") == "error, meant: INVALID_REQUEST"
    assert judged(churn, invalid) == "wrong"  # it was answered


def test_memory_that_grows_after_the_first_quarter_has_a_slope_and_a_start_that_fills_caches_has_none() -> None:
    flat = [sample(60.0 * minute, 300 + 20 * min(minute, 15)) for minute in range(61)]
    leaking = [sample(60.0 * minute, 600 + minute) for minute in range(61)]

    assert health.slope(flat) == pytest.approx(0.0, abs=1e-6)
    assert health.slope(leaking) == pytest.approx(60 / 637.5, rel=1e-3)
    assert health.growth(leaking) == pytest.approx(45 / 637.5, rel=1e-3)


def test_a_bill_has_to_lie_between_what_was_read_and_what_may_have_been_served() -> None:
    usage = TenantUsage(
        tenant="large", adapter="a00000", requests=2, prompt_tokens=18, cached_tokens=0, output_tokens=8, refused=0,
        upload_bytes=0,
    )  # fmt: skip
    labels = frozenset({("tenant", "large")})
    page = Page({("gralora_tenant_prompt_tokens_total", labels): 18, ("gralora_tenant_output_tokens_total", labels): 8})
    left = replace(SENT, at_least=(9, 2), at_most=(9, 20))

    assert problems_of(bills([SENT, left], [usage], page)) == []
    assert problems_of(bills([SENT], [usage], page)) == [
        "large: 18 prompt tokens were counted, between 9 and 9 were served",
        "large: 8 output tokens were counted, between 4 and 4 were served",
    ]
    assert len(problems_of(bills([SENT, left], [usage], EMPTY))) == 2
    assert len(problems_of(bills([SENT], [], EMPTY))) == 2
    assert Bill((1, 1), (1, 1), (1, 1), (1, 2)).problems == ["1 output tokens by GetUsage, 2 by the metrics page"]


def test_drift_is_of_the_last_third_over_the_first() -> None:
    early = [replace(SENT, ttft_s=0.1, answer=replace(ANSWER, sent_s=float(second))) for second in range(100)]
    late = [replace(SENT, ttft_s=0.3, answer=replace(ANSWER, sent_s=200.0 + second)) for second in range(100)]

    assert drift([*early, *late], observed(), "ttft_s") == pytest.approx(3.0)
    assert drift(early, observed(), "ttft_s") == float("inf")  # nobody was answered at the end
    assert drift([*early, *late], observed(), "itl_s") == float("inf")


def test_each_adapter_has_one_customer_and_the_configuration_is_one(tmp_path: Path) -> None:
    write_configuration(tmp_path / "gralora.toml", 3)
    written = tomllib.loads((tmp_path / "gralora.toml").read_text())
    ownership = Ownership(TenancySettings(tenants=written["tenants"], admin_tokens=written["admin_tokens"]))

    assert sum(one.share for one in CUSTOMERS) == pytest.approx(1.0)
    for name in (f"a0000{digit}" for digit in "0123456789"):
        assert [one.name for one in CUSTOMERS if one.owns(name)] == [ownership.owner(name)]


def test_a_names_prompt_is_always_the_same_and_lengths_differ() -> None:
    prompts = [soak_prompt(f"a{number:05}", 320) for number in range(50)]

    assert prompts == [soak_prompt(f"a{number:05}", 320) for number in range(50)]
    lengths = {len(prompt) for prompt in prompts}
    assert len(lengths) > 20
    assert min(lengths) >= PROMPT_TOKENS[0]
    assert max(lengths) <= PROMPT_TOKENS[1]
