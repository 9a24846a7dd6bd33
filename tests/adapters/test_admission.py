"""Golden prompts: nobody gets a version before it has answered them, and one that fails is kept apart."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from adapters.harness import WAIT_S, is_pending, lease, managing, quiesce, until, use
from adapters.test_versions import write_version
from support.checkpoints import edit_config

from gralora_runtime.adapters.catalogue.quarantine import FIRST_S, LONGEST_S, Quarantine
from gralora_runtime.adapters.catalogue.sources.directory import DirectorySource
from gralora_runtime.adapters.catalogue.store import AdapterState
from gralora_runtime.adapters.checkpoint.golden import GoldenAnswer, GoldenCase, difference
from gralora_runtime.adapters.checkpoint.header import CONFIG_FILE, GOLDEN_FILE, files_stamp
from gralora_runtime.adapters.manager import AdapterManager
from gralora_runtime.adapters.residency.lease import AdapterLease
from gralora_runtime.errors import (
    AdapterBusyError,
    AdapterNotFoundError,
    AdapterRejectedError,
    DrainingError,
    InvalidRequestError,
    StepFailedError,
)

VOCAB_SIZE = 100
RIGHT, WRONG = (7, 8), (7, 9)


class Engine:
    """Answers `RIGHT` to everything, when it is let; as an engine does, it gives each lease back."""

    def __init__(self, manager: AdapterManager) -> None:
        self.asked: list[tuple[str, tuple[int, ...]]] = []
        self.held: list[Future[GoldenAnswer]] = []
        self.holds = False
        self.fails: Exception | None = None
        self._manager = manager

    def examine(self, case: GoldenCase, held: AdapterLease) -> Future[GoldenAnswer]:
        self.asked.append((f"{held.name}@{held.version}", case.prompt_token_ids))
        self._manager.release(held)
        answer: Future[GoldenAnswer] = Future()
        if self.holds:
            self.held.append(answer)
        elif self.fails is not None:
            answer.set_exception(self.fails)
        else:
            answer.set_result(GoldenAnswer(RIGHT, (), 0.0))
        return answer

    def let_go(self) -> None:
        self.holds = False
        self.held.pop().set_result(GoldenAnswer(RIGHT, (), 0.0))


@contextmanager
def trying(root: Path, **options: Any) -> Iterator[tuple[AdapterManager, Engine]]:
    with managing(root, **({"vocab_size": VOCAB_SIZE, "units": 8} | options)) as manager:
        engine = Engine(manager)
        manager.examine_with(engine.examine)
        yield manager, engine


def write_golden(root: Path, name: str, *answers: tuple[int, ...]) -> None:
    cases = [{"prompt_token_ids": [at + 1], "expected_token_ids": list(answer)} for at, answer in enumerate(answers)]
    (root / name / GOLDEN_FILE).write_text(json.dumps({"version": 1, "model": "toy", "cases": cases}))


def write_tried(root: Path, seed: int, *answers: tuple[int, ...]) -> None:
    """As `write_version`, of the name `a`; the golden prompts are there before the weights are."""
    (root / "a").mkdir(exist_ok=True, parents=True)
    write_golden(root, "a", *answers)
    write_version(root, "a", seed)


def end_quarantine(manager: AdapterManager, name: str = "a") -> None:
    alias = manager._store.get(name)
    for quarantine in (alias.quarantine, *(version.quarantine for version in alias.versions.values())):
        quarantine.until_s = 0.0


def test_the_first_request_waits_for_the_trial_and_the_next_ones_do_not(tmp_path: Path) -> None:
    write_tried(tmp_path, 0, RIGHT, RIGHT)
    with trying(tmp_path) as (manager, engine):
        assert use(manager, "a").version == 1
        assert engine.asked == [("a@1", (1,)), ("a@1", (2,))]
        use(manager, "a")
        manager.load("a").result(WAIT_S)
        assert len(engine.asked) == 2


def test_nobody_gets_it_while_it_is_being_tried(tmp_path: Path) -> None:
    write_tried(tmp_path, 0, RIGHT)
    with trying(tmp_path) as (manager, engine):
        engine.holds = True
        waiting = [manager.acquire("a"), manager.acquire("a@1")]
        until(lambda: engine.held)
        waiting.append(manager.acquire("a"))

        assert not any(future.done() for future in waiting)
        assert manager.get("a").state == AdapterState.LOADING
        manager.check_integrity()
        engine.let_go()
        for future in waiting:
            manager.release(future.result(WAIT_S))
        assert manager.get("a").state == AdapterState.RESIDENT


def test_a_mismatch_refuses_it_and_names_the_case_and_the_token(tmp_path: Path) -> None:
    write_tried(tmp_path, 0, RIGHT, WRONG)
    with trying(tmp_path) as (manager, engine):
        with pytest.raises(
            AdapterRejectedError, match=r"golden.json: cases\[1\] answers \[8\] where \[9\] was expected"
        ):
            lease(manager, "a")
        quiesce(manager)
        info = manager.get("a")

        assert (info.state, "cases[1]" in info.error) == (AdapterState.FAILED, True)
        assert manager.stats().leases == 0
        with pytest.raises(AdapterRejectedError):
            lease(manager, "a")
        assert len(engine.asked) == 2  # the same error, at once


def test_the_others_are_served_beside_it(tmp_path: Path) -> None:
    write_tried(tmp_path, 0, WRONG)
    write_version(tmp_path, "b", 1)
    with trying(tmp_path) as (manager, _):
        with pytest.raises(AdapterRejectedError):
            lease(manager, "a")
        assert use(manager, "b").version == 1


@pytest.mark.parametrize("follows", [True, False])
def test_new_content_is_promoted_once_it_has_answered(tmp_path: Path, follows: bool) -> None:
    write_tried(tmp_path, 0, RIGHT)
    with trying(tmp_path, sources=[DirectorySource(tmp_path, follows=follows)]) as (manager, engine):
        use(manager, "a")
        engine.holds = True
        write_tried(tmp_path, 1, RIGHT)
        loading = manager.load("a")
        until(lambda: engine.held)

        assert use(manager, "a").version == 1  # goes on, and waits for nobody
        with pytest.raises(InvalidRequestError, match="is being tried"):
            manager.promote("a", "2")
        with pytest.raises(InvalidRequestError, match="is being tried"):
            manager.set_canary("a", "2", 0.5)
        engine.let_go()
        assert loading.result(WAIT_S).version == (2 if follows else 1)
        assert use(manager, "a").version == (2 if follows else 1)
        assert manager.promote("a").version == 2


def test_new_content_that_fails_changes_nothing_for_requests(tmp_path: Path) -> None:
    write_tried(tmp_path, 0, RIGHT)
    with trying(tmp_path) as (manager, _):
        first = use(manager, "a")
        write_tried(tmp_path, 1, WRONG)
        manager.refresh("a")
        until(lambda: manager.get("a").error)

        info = manager.get("a")
        assert (info.version, [version.number for version in info.versions]) == (1, [1, 2])
        assert "cases[0]" in info.error
        assert use(manager, "a").digest == first.digest
        with pytest.raises(AdapterRejectedError):
            lease(manager, "a@2")
        with pytest.raises(InvalidRequestError, match=r"has not answered its golden prompts: .*cases\[0\]"):
            manager.promote("a", "2")
        write_tried(tmp_path, 2, RIGHT)
        assert manager.load("a").result(WAIT_S).version == 3
        assert manager.get("a").error == ""


def test_golden_prompts_that_are_put_right_are_tried_at_once(tmp_path: Path) -> None:
    write_tried(tmp_path, 0, WRONG)
    with trying(tmp_path) as (manager, _):
        with pytest.raises(AdapterRejectedError):
            lease(manager, "a")
        write_golden(tmp_path, "a", RIGHT)
        assert manager.load("a").result(WAIT_S).version == 1
        assert use(manager, "a").version == 1


def test_a_version_that_was_admitted_stays_so_whatever_is_expected_of_it_later(tmp_path: Path) -> None:
    """Who serves is not taken away by a line in a file; the next start, and the next version, are tried."""
    write_tried(tmp_path, 0, RIGHT)
    with trying(tmp_path) as (manager, engine):
        use(manager, "a")
        write_golden(tmp_path, "a", WRONG)
        assert manager.load("a").result(WAIT_S).version == 1
        assert use(manager, "a").version == 1
        assert len(engine.asked) == 1
    with trying(tmp_path) as (manager, _), pytest.raises(AdapterRejectedError):
        lease(manager, "a")


def test_what_failed_is_tried_again_after_a_while_if_it_is_used(tmp_path: Path) -> None:
    """An engine that could not answer is not the adapter's fault."""
    write_tried(tmp_path, 0, RIGHT)
    with trying(tmp_path) as (manager, engine):
        use(manager, "a")
        write_tried(tmp_path, 1, RIGHT)
        engine.fails = StepFailedError("0")
        manager.refresh("a")
        until(lambda: manager.get("a").error)
        engine.fails = None
        assert use(manager, "a").version == 1
        assert len(engine.asked) == 2
        with pytest.raises(StepFailedError):
            lease(manager, "a@2")

        end_quarantine(manager)
        assert use(manager, "a").version == 1  # which sets it going
        until(lambda: manager.get("a").version == 2)
        assert use(manager, "a").version == 2


def test_files_that_could_not_be_read_are_read_again_after_a_while(tmp_path: Path) -> None:
    write_version(tmp_path, "a", 0)
    good = (tmp_path / "a" / CONFIG_FILE).read_text()
    edit_config(tmp_path / "a", r=0)
    with trying(tmp_path) as (manager, _):
        for _ in range(3):
            with pytest.raises(AdapterRejectedError):
                lease(manager, "a")
        stamp = manager._store.get("a").current.refused
        assert stamp is not None
        (tmp_path / "a" / CONFIG_FILE).write_text(good)
        manager._store.get("a").current.refused = ((stamp[0][0], files_stamp(tmp_path / "a")), stamp[1])
        with pytest.raises(AdapterRejectedError):  # as if nothing had changed
            lease(manager, "a")

        end_quarantine(manager)
        assert use(manager, "a").version == 1


@pytest.mark.parametrize(
    ("text", "problem"), [("{", "golden.json"), ('{"version": 2}', "version: 2 is not 1")], ids=["cut", "newer"]
)
def test_golden_prompts_that_cannot_be_read_refuse_the_adapter_by_its_name(
    tmp_path: Path, text: str, problem: str
) -> None:
    write_version(tmp_path, "acme/a", 0)
    (tmp_path / "acme" / "a" / GOLDEN_FILE).write_text(text)
    with trying(tmp_path) as (manager, engine):
        with pytest.raises(AdapterRejectedError, match=f"'acme/a'.*{problem}"):
            lease(manager, "acme/a")
        assert not engine.asked


def test_a_name_that_comes_with_a_load_which_fails_does_not_stay(tmp_path: Path) -> None:
    with trying(tmp_path) as (manager, _):
        write_tried(tmp_path, 0, WRONG)
        with pytest.raises(AdapterRejectedError):
            manager.load("a", tmp_path / "a").result(WAIT_S)
        with pytest.raises(AdapterNotFoundError):
            manager.get("a")


def test_who_gives_up_meanwhile_leaves_nothing(tmp_path: Path) -> None:
    write_tried(tmp_path, 0, RIGHT)
    with trying(tmp_path) as (manager, engine):
        engine.holds = True
        waiting = manager.acquire("a")
        until(lambda: engine.held)
        manager.abandon(waiting)
        with pytest.raises(AdapterBusyError):
            manager.unload("a")
        engine.let_go()
        until(lambda: manager.get("a").state == AdapterState.RESIDENT)
        assert manager.stats().leases == 0


def test_a_trial_keeps_its_weights_in_a_pool_that_others_want(tmp_path: Path) -> None:
    write_tried(tmp_path, 0, RIGHT)
    write_version(tmp_path, "b", 1)
    with trying(tmp_path, units=1) as (manager, engine):
        engine.holds = True
        first = manager.acquire("a")
        until(lambda: engine.held)
        second = manager.acquire("b")
        assert is_pending(manager, second)
        engine.let_go()
        manager.release(first.result(WAIT_S))
        manager.release(second.result(WAIT_S))


def test_closing_answers_those_who_wait_for_a_trial(tmp_path: Path) -> None:
    write_tried(tmp_path, 0, RIGHT)
    with managing(tmp_path, vocab_size=VOCAB_SIZE) as manager:  # and nobody who examines
        waiting = manager.acquire("a")
        until(lambda: manager.stats().leases == 1)
        manager.close()
        with pytest.raises(DrainingError):
            waiting.result(WAIT_S)


def test_new_content_that_was_being_tried_at_a_kill_is_tried_by_the_next_server(tmp_path: Path) -> None:
    root, state = tmp_path / "adapters", tmp_path / "state"
    write_tried(root, 0, RIGHT)
    with trying(root, state_dir=state) as (manager, engine):
        use(manager, "a")
        engine.holds = True
        write_tried(root, 1, RIGHT)
        manager.refresh("a")
        until(lambda: engine.held)
        manager.flush()
        engine.held.pop().set_exception(DrainingError())
        manager.close()
    with trying(root, state_dir=state) as (manager, engine):
        until(lambda: manager.get("a").version == 2)
        assert use(manager, "a").version == 2


def test_each_failure_doubles_the_wait() -> None:
    now = 0.0
    quarantine = Quarantine(now_s=lambda: now)
    waits = []
    for _ in range(12):
        quarantine.extend()
        quarantine.extend()  # by somebody else who saw the same
        assert quarantine.lasts
        waits.append(quarantine.until_s - now)
        now = quarantine.until_s
        assert not quarantine.lasts
    assert waits[:4] == [FIRST_S, 2 * FIRST_S, 4 * FIRST_S, 8 * FIRST_S]
    assert waits[-1] == LONGEST_S
    quarantine.end()
    quarantine.extend()
    assert quarantine.until_s == now + FIRST_S


RIVALS = (((7, -0.1), (3, -3.0)), ((8, -0.7), (9, -0.71)))


@pytest.mark.parametrize(
    ("expected", "answered", "tie", "is_right"),
    [
        ((7, 8), (7, 8), 0.0, True),
        ((7, 9), (7, 8), 0.0, False),
        ((7, 9), (7, 8), 0.02, True),
        ((7, 9, 1), (7, 8, 2), 0.02, True),  # behind a tie nothing can be compared
        ((3, 8), (7, 8), 0.02, False),
        ((4, 8), (7, 8), 9.0, False),  # not among the likeliest
        ((7, 8, 9), (7, 8), 9.0, False),  # ends too soon
        ((7,), (7, 8), 9.0, False),
    ],
)
def test_only_a_tie_may_go_the_other_way(
    expected: tuple[int, ...], answered: tuple[int, ...], tie: float, is_right: bool
) -> None:
    case = GoldenCase(prompt_token_ids=(1,), expected_token_ids=expected)
    assert (difference(case, GoldenAnswer(answered, RIVALS, tie)) == "") == is_right
