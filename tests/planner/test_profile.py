"""What a step costs by a profile, what waves say of it, and what is no profile."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from gralora_runtime.errors import ConfigError
from gralora_runtime.plan import AdapterUse, RowPlan, StepPlan
from gralora_server.planner.points import SHORT, Point, Points
from gralora_server.planner.prices import prices_of
from gralora_server.planner.profile import Profile

from .profiles import STEP_S, TOKEN_S, profile

BASE_S = {1: 0.010, 2: 0.011, 4: 0.012, 8: 0.015, 16: 0.020, 32: 0.030, 64: 0.055}
BYTE_S, TOKEN_BYTE_S, CONTEXT_S, PREFILL_CONTEXT_S, REQUEST_S = 2e-9, 3e-11, 4e-6, 5e-8, 0.004
SIZES = [1_000_000, 2_000_000, 3_000_000, 4_000_000, 5_000_000, 6_000_000, 7_000_000, 8_000_000]


def row(count: int, *, slot: int = -1, start: int = 0) -> RowPlan:
    return RowPlan("r", (0,) * count, start, (), AdapterUse(slot, 0, 0), samples=True, seat=0)


def time_s(point: Point) -> float:
    """A machine on which everything costs exactly what the constants above say."""
    if not point.first:
        adapters = sum(SIZES[: point.rows]) * BYTE_S if point.adapted else 0.0
        return BASE_S[point.rows] + adapters + point.rows * (point.prompt - SHORT) * CONTEXT_S
    total = REQUEST_S
    for start in range(0, point.prompt, 64):
        count = min(64, point.prompt - start)
        total += BASE_S[count] + start * count * PREFILL_CONTEXT_S
        total += SIZES[0] * (BYTE_S + (count - 1) * TOKEN_BYTE_S) if point.adapted else 0.0
    return total


def test_costs_are_found_again() -> None:
    points = Points(max_num_seqs=8, max_num_batched_tokens=64)

    costs = points.costs({point: time_s(point) for point in points.all()}, SIZES)

    assert {point.tokens: point.seconds for point in costs.step_s} == pytest.approx(BASE_S)
    assert costs.adapter_byte_s == pytest.approx(BYTE_S)
    assert costs.adapter_token_byte_s == pytest.approx(TOKEN_BYTE_S)
    assert costs.context_token_s == pytest.approx(CONTEXT_S)
    assert costs.prefill_context_s == pytest.approx(PREFILL_CONTEXT_S)
    assert costs.request_s == pytest.approx(REQUEST_S)


def test_no_cost_is_negative() -> None:
    """A wave that a quiet moment made too fast says that something is free, not that it gives time back."""
    points = Points(max_num_seqs=2, max_num_batched_tokens=8)
    fast = {point: 0.005 if point.adapted or point.prompt != SHORT else 0.01 for point in points.all()}

    costs = points.costs(fast, SIZES)

    assert (costs.adapter_byte_s, costs.context_token_s, costs.request_s) == (0, 0, 0)
    assert [point.seconds for point in costs.step_s] == [0.01] * 4


def test_a_server_of_few_rows_and_short_prompts_can_be_measured() -> None:
    points = Points(max_num_seqs=1, max_num_batched_tokens=3, longest=2)

    costs = points.costs(dict.fromkeys(points.all(), 0.01), SIZES)

    assert [point.tokens for point in costs.step_s] == [1, 2]


@pytest.mark.parametrize(
    ("tokens", "seconds"),
    [(1, STEP_S), (51, STEP_S + 50 * TOKEN_S), (101, STEP_S + 100 * TOKEN_S), (201, STEP_S + 200 * TOKEN_S)],
)
def test_between_and_above_the_points_is_a_line(tokens: int, seconds: float) -> None:
    assert profile().base_s(tokens) == pytest.approx(seconds)


def test_a_step_is_the_sum_of_its_costs() -> None:
    costs = {"adapter_byte_s": 1e-6, "adapter_token_byte_s": 1e-7, "context_token_s": 1e-4, "prefill_context_s": 1e-5}
    rows = [row(1, slot=0, start=100), row(1, slot=0, start=200), row(1), row(20, slot=1, start=64)]

    seconds = profile(**costs).plan_s(StepPlan(tuple(rows), 3), {0: 1000, 1: 2000})

    base = STEP_S + 22 * TOKEN_S
    adapters = 1000 * (1e-6 + 1e-7) + 2000 * (1e-6 + 19e-7)  # the first one is read once for two rows
    assert seconds == pytest.approx(base + adapters + 300 * 1e-4 + 20 * 64 * 1e-5)


def test_a_profile_is_read_as_it_was_written(tmp_path: Path) -> None:
    profile().write(tmp_path / "made" / "profile.json")

    assert Profile.read(tmp_path / "made" / "profile.json") == profile()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 7}, "version 1"),
        ({"step_s": []}, "step_s"),
        ({"request_s": "soon"}, "request_s"),
        (None, "no profile"),
    ],
)
def test_what_is_no_profile_is_said(tmp_path: Path, change: dict[str, object] | None, words: str) -> None:
    path = tmp_path / "profile.json"
    path.write_text("nothing" if change is None else json.dumps(profile().model_dump() | change))

    with pytest.raises(ConfigError, match=words):
        Profile.read(path)


@pytest.mark.parametrize("name", ["nowhere.json", "\0"])
def test_a_profile_that_is_not_there(name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        Profile.read(Path(name))


def test_a_profile_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "profile.json").write_bytes(b"\xff\xfe")

    with pytest.raises(ConfigError, match="cannot be read"):
        Profile.read(tmp_path / "profile.json")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"settings": {"max_num_batched_tokens": 256}}, "lacks settings.max_num_seqs"),
        ({"settings": {"max_num_batched_tokens": 0, "max_num_seqs": 8}}, "take no time"),
        ({"settings": {"max_num_batched_tokens": 10**400, "max_num_seqs": 8}}, "take no time"),
        ({"step_s": [{"tokens": 1, "seconds": 0.0}, {"tokens": 2, "seconds": 0.0}]}, "take no time"),
        ({"load_byte_s": -1.0, "load_slowdown": 1.0}, "byte -"),
        ({"load_byte_s": math.nan}, "byte nan"),
    ],
)
def test_a_profile_that_gives_no_prices_is_refused(change: dict[str, object], words: str) -> None:
    found = Profile.model_validate(profile().model_dump() | change)

    with pytest.raises(ConfigError, match=words):
        prices_of(found)
