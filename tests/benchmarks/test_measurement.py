"""What is derived from the times of tokens, and the order of rounds."""

from __future__ import annotations

import pytest

from benchmarks.measurement import Answer, Contender, Run, by_turns_s, interleave
from benchmarks.workload import Request

REQUEST = Request("", (1, 2), 3)


def run_of(*times_s: tuple[float, ...]) -> Run:
    return Run(tuple(Answer(REQUEST, tuple(range(len(times))), times) for times in times_s))


def test_a_decode_step_is_timed_while_all_requests_decode():
    """The first request decodes one token before the second has its first, and the second one after the first ended."""
    run = run_of((1.0, 2.0, 3.0, 4.0), (2.0, 3.0, 4.0, 9.0))

    assert run.decode_step_s == 1.0
    assert run.ttft_s == [1.0, 2.0]
    assert run.total_s == 9.0


def test_tokens_that_come_several_at_a_time_count_each():
    assert run_of((1.0, 2.0, 2.0, 3.0, 3.0)).decode_step_s == 0.5


def test_one_token_makes_no_decode_step():
    assert run_of((1.0,), (2.0,)).decode_step_s is None


def contender(name: str, calls: list[tuple[str, int]]) -> Contender:
    def serve(index: int) -> list[Run]:
        calls.append((name, index))
        return [run_of((float(index),))]

    return Contender(name=name, run=serve)


def test_contenders_take_turns_and_the_warm_up_does_not_count():
    calls: list[tuple[str, int]] = []

    rounds = interleave([contender("a", calls), contender("b", calls)], 2, check=lambda _: None)

    assert calls == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2), ("b", 2)]
    assert [runs[0].total_s for runs in rounds["b"]] == [1.0, 2.0]


@pytest.mark.parametrize("red_at", [0.0, 1.0])
def test_nothing_is_returned_once_the_check_fails(red_at):
    calls: list[tuple[str, int]] = []

    def check(run: Run) -> None:
        if run.total_s == red_at:
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        interleave([contender("a", calls), contender("b", calls)], 3, check=check)

    assert 1 + 2 * red_at == len(calls)


def test_works_that_take_turns_are_timed_together_after_one_pass_that_is_not():
    calls: list[str] = []

    times = by_turns_s({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, samples=2)

    assert calls == ["a", "b"] * 3
    assert {name: len(samples_s) for name, samples_s in times.items()} == {"a": 2, "b": 2}
