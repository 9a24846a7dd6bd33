"""What is made of Dynamo's answers: a piece counts the tokens until then, and the text has to be the server's."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.dynamo import DYNAMO, as_direct, summarize
from benchmarks.gate import GateRedError
from benchmarks.http_client import Heard
from benchmarks.record import FIRST_MEAN, STEP, WHOLE, Row
from benchmarks.sections import GRPC, HTTP
from benchmarks.workload import Request

REQUESTS = [Request("a0", (5, 6), 3)]


class Told:
    """A worker that answers so."""

    def __init__(self, text: str) -> None:
        self.text = text

    def answers(self, requests: list[Request]) -> list[dict[str, Any]]:
        return [{"text": self.text, "times_s": [0.1, 0.2, 0.3]} for _ in requests]


def test_tokens_have_the_times_of_the_pieces_that_count_them() -> None:
    heard = Heard()
    for text, count, now_s in (("a", 1, 0.1), ("", 3, 0.2)):
        heard.of_dynamos({"choices": [{"text": text}], "usage": {"completion_tokens": count}}, now_s)
    heard.of_dynamos({"choices": [], "usage": {"completion_tokens": 3}}, 0.3)

    assert (heard.text, heard.times_s) == ("a", [0.1, 0.2, 0.2])


def test_an_answer_through_dynamo_has_the_tokens_of_the_direct_one() -> None:
    (answer,) = as_direct(REQUESTS, Told("abc"), [{"text": "abc", "tokens": [7, 8, 9]}]).answers

    assert (answer.tokens, answer.times_s) == ((7, 8, 9), (0.1, 0.2, 0.3))


def test_another_text_is_no_answer() -> None:
    with pytest.raises(GateRedError, match="Dynamo said 'abd'"):
        as_direct(REQUESTS, Told("abd"), [{"text": "abc", "tokens": [7, 8, 9]}])


def test_ways_are_compared_round_by_round() -> None:
    samples = {GRPC: [1.0, 3.0, 2.0], HTTP: [1.5, 3.5, 2.5], DYNAMO: [3.0, 4.0, 4.5]}
    rows = [
        Row(contender=way, measure=measure, samples_s=samples_s, requests=1, tokens=3, costs=[])
        for way, samples_s in samples.items()
        for measure in (STEP, FIRST_MEAN, WHOLE)
    ]
    summary = summarize(rows)

    assert summary[HTTP][STEP] == 2.5
    assert summary[HTTP][f"{STEP}, later than gRPC"] == 0.5
    assert summary[DYNAMO][f"{WHOLE}, later than gRPC"] == 2.0
