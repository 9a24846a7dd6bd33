"""The benchmark of thousands of adapters: what its soak calls wrong, and all of it with few. Speed is not looked at."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.catalogue import truth
from benchmarks.catalogue.answers import Answer
from benchmarks.catalogue.base import base_of, save_tiny_llama
from benchmarks.catalogue.churn import LOST, Changing, Churn
from benchmarks.catalogue.content import KINDS, Contents, exchange_directory, exchange_files, put_in_place
from benchmarks.catalogue.fleet import Fleet, make_fleet
from benchmarks.catalogue.history import ABSENT, History, Verdict
from benchmarks.catalogue.memory import growth
from benchmarks.catalogue.soak import verdict_of

ROOT = Path(__file__).parent.parent.parent
TOKENS = (5, 6, 7, 8, 9, 10)


@pytest.fixture(scope="module")
def contents(tmp_path_factory: pytest.TempPathFactory) -> Contents:
    return Contents(base_of("tiny", save_tiny_llama(tmp_path_factory.mktemp("model"))))


@pytest.fixture
def fleet(contents: Contents, tmp_path: Path) -> Fleet:
    return make_fleet(contents, tmp_path, 3)


def judged(churn: Churn, **changes: object) -> str:
    answer = {"name": "a00000", "wanted": "", "sent_s": 10.0, "ended_s": 11.0, "digest": "d0", "tokens": TOKENS}
    expected = {(0, "a00000"): TOKENS, (7, "a00000"): TOKENS[::-1]}
    return verdict_of(Answer(**(answer | changes)), churn, expected)


@pytest.fixture
def churn(fleet: Fleet) -> Churn:
    churn = Churn(fleet, list(fleet.initial), seed=0)
    churn.contents |= {"d0": 0, "d7": 7}
    return churn


def test_both_contents_are_right_while_a_change_is_not_acknowledged_and_the_old_one_is_stale_after() -> None:
    history = History.of(1)
    history.change(2, sent_s=5.0, acknowledged_s=6.0)

    assert history.judge(1, 3.0, 4.0) is history.judge(1, 5.5, 9.0) is Verdict.RIGHT
    assert history.judge(2, 5.5, 9.0) is history.judge(2, 7.0, 8.0) is Verdict.RIGHT
    assert history.judge(1, 6.1, 9.0) is Verdict.STALE
    assert history.judge(2, 3.0, 4.0) is Verdict.STALE  # too early is as wrong
    assert history.judge(3, 5.5, 9.0) is history.judge(None, 5.5, 9.0) is Verdict.FOREIGN


def test_a_canary_is_right_only_while_it_is_one() -> None:
    history = History.of(1)
    history.share(2, from_s=5.0, to_s=6.0)

    assert history.judge(2, 5.5, 9.0) is history.judge(1, 5.5, 9.0) is Verdict.RIGHT
    assert history.judge(2, 6.1, 9.0) is not Verdict.RIGHT
    assert history.current == 1


def test_an_unloaded_name_may_be_not_found_and_may_not_answer() -> None:
    history = History.of(1)
    history.change(ABSENT, sent_s=5.0, acknowledged_s=6.0)
    history.change(1, sent_s=8.0, acknowledged_s=9.0)

    assert history.judge(1, 6.1, 7.9) is Verdict.STALE
    assert history.is_excused("ADAPTER_NOT_FOUND", 6.1, 7.9)
    assert not history.is_excused("ADAPTER_NOT_FOUND", 9.1, 9.9)
    assert not history.is_excused("INTERNAL", 6.1, 7.9)


def test_a_version_whose_files_are_others_may_be_lost_until_the_name_stands_for_another() -> None:
    one = Changing("x", History.of(1), on_disk=2)
    one.stand_for(2, 1.0, 2.0)
    one.stand_for(1, 3.0, 4.0)
    one.stand_for(2, 5.0, 6.0)

    assert one.history.is_excused("ADAPTER_VERSION_LOST", 4.5, 4.6)
    assert not one.history.is_excused("ADAPTER_VERSION_LOST", 6.1, 6.2)
    assert one.history.excuses[0].reasons == LOST


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "right"),
        ({"tokens": TOKENS[:2], "is_whole": False}, "right"),
        ({"tokens": TOKENS[:2]}, "wrong"),  # too few
        ({"tokens": TOKENS[::-1]}, "wrong"),  # another content's, under this digest
        ({"digest": "d7", "tokens": TOKENS[::-1]}, "wrong"),  # a content that the name never had
        ({"digest": "torn"}, "wrong"),  # nobody wrote that
        ({"wanted": "d7"}, "wrong"),
        ({"wanted": "d0"}, "right"),
        ({"error": "INTERNAL"}, "error, unexpected: INTERNAL"),
        ({"error": "ADAPTER_REJECTED"}, "error, unexpected: ADAPTER_REJECTED"),
    ],
)
def test_verdicts(churn: Churn, changes: dict[str, object], verdict: str) -> None:
    assert judged(churn, **changes) == verdict


def test_an_answer_from_before_an_acknowledged_promotion_is_stale(churn: Churn) -> None:
    churn.by_name["a00000"].stand_for(7, 8.0, 9.0)

    assert judged(churn) == "stale"
    assert judged(churn, digest="d7", tokens=TOKENS[::-1]) == "right"


def test_a_content_is_the_same_whenever_it_is_written_and_no_two_are_the_same(
    contents: Contents, tmp_path: Path
) -> None:
    digests = []
    for number in [*range(len(KINDS)), len(KINDS), 0]:
        contents.write(number, tmp_path / str(len(digests)))
        digests.append(contents.digest(tmp_path / str(len(digests))))

    assert digests[0] == digests[-1]
    assert len(set(digests)) == len(digests) - 1


def test_one_name_of_many_shares_the_content_of_the_one_before(fleet: Fleet) -> None:
    assert fleet.initial == {"a00000": 0, "a00001": 0, "a00002": 2}


@pytest.mark.parametrize("exchange", [exchange_files, exchange_directory, put_in_place])
def test_a_replacement_leaves_the_new_content_and_nothing_else(fleet: Fleet, exchange) -> None:
    staged = fleet.stage(9)
    wanted = fleet.contents.digest(staged)

    exchange(staged, fleet.directory / "a00000")

    assert fleet.contents.digest(fleet.directory / "a00000") == wanted
    assert list(fleet.staging.iterdir()) == []


def test_tokens_that_peft_would_not_choose_are_told(contents: Contents, tmp_path: Path) -> None:
    asked = (10, "a00000")
    right = truth.expected_tokens(contents, tmp_path / "truth", [asked])[asked]
    other = truth.expected_tokens(contents, tmp_path / "other", [(11, "a00000")])[11, "a00000"]

    assert truth.unlike_peft(contents, tmp_path, {asked: right}) == []
    assert truth.unlike_peft(contents, tmp_path, {asked: other}) == [asked]


def test_memory_is_flat_if_the_last_third_is_as_the_middle_one() -> None:
    rising = [(float(second), 100 + second) for second in range(90)]

    assert growth([(at_s, 100) for at_s, _ in rising]) == 0
    assert math.isclose(growth(rising), 174.5 / 144.5 - 1)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, dict, Path]:
    out = tmp_path_factory.mktemp("out")
    ran = subprocess.run(
        [sys.executable, "-m", "benchmarks.catalogue", "--quick", "--json", str(out / "quick.json")],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
        timeout=400,
        capture_output=True,
        text=True,
    )
    assert (out / "quick.json").exists(), ran.stderr[-2000:]
    return ran.returncode, json.loads((out / "quick.json").read_text()), out


def test_a_quick_run_finds_nothing_wrong(quick) -> None:
    status, result, _ = quick
    judged = [gate for part in result["parts"].values() for gate in part["gates"] if not gate["is_speed"]]

    assert [gate for gate in judged if not gate["passed"]] == [], result["parts"]["soak"]["examples"]
    assert len(judged) == 7
    assert status == 0


def test_a_quick_run_measures_everything_and_is_marked_as_quick(quick) -> None:
    _, result, out = quick
    parts = result["parts"]

    assert result["quick"] is True
    assert result["model"] == "a tiny random Llama"
    assert list(parts) == ["start", "gaps", "soak"]
    assert parts["soak"]["answers"] > 0
    assert (
        parts["soak"]["distinct_answers"] > 0.9 * parts["soak"]["contents_answered"]
    )  # else wrong ones would not show
    assert parts["soak"]["evictions"] > 0
    assert parts["soak"]["changes"]
    assert len(parts["gaps"]["quiet_p99_ms"]) == len(parts["gaps"]["busy_p99_ms"]) == 1
    assert len(parts["gaps"]["first_tokens"]) == 2
    assert len(parts["start"]["start_s"]) == len(parts["start"]["acquire_us"]) == 1
    assert (out / "catalogue-memory.png").stat().st_size > 0
