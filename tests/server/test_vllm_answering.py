"""What deltas become in vLLM's protocol, as its clients count on it."""

from __future__ import annotations

import pytest
from support.fake_engine import finished, token
from support.vllm_grpc import Response, generate

from gralora.foreign import vllm_pb2
from gralora_runtime.request import Delta, FinishReason, Started, TokenLogprob
from gralora_server.vllm_grpc.answering import Answering
from gralora_server.vllm_grpc.asking import read_request

FinishInfo = vllm_pb2.FinishInfo
STARTED = Delta(
    started=Started(
        prompt_tokens=3,
        cached_tokens=1,
        queue_time_s=0.25,
        seed=1,
        adapter="",
        adapter_digest="",
        prompt_token_ids=(7, 8, 9),
    )
)
BOTH = {"output_token_ids": True}


def answers(*deltas: Delta, **fields: object) -> list[Response]:
    answering = Answering(read_request(generate(**fields), base="fake"))
    return [piece for delta in deltas for piece in answering.pieces(delta)]


def scored(token_id: int, *top: tuple[int, float], logprob: float = -1.0) -> Delta:
    return Delta(text="x", token_ids=(token_id,), logprobs=(TokenLogprob(token_id, logprob, top),))


def test_the_prompt_comes_first_and_the_end_last() -> None:
    first, middle, last = answers(STARTED, token(1), finished(output_tokens=1), response=BOTH)

    assert first == Response(prompt_info={"num_prompt_tokens": 3, "token_ids": [7, 8, 9]})
    assert middle == Response(outputs={"text": "t1 ", "num_tokens": 1, "token_ids": [1]})
    assert last == Response(outputs={"finish_info": {"num_output_tokens": 1, "finish_reason": FinishInfo.LENGTH}})


def test_one_delta_may_be_all_of_it() -> None:
    whole = Delta(text="ab", token_ids=(1, 2), started=STARTED.started, finished=finished(output_tokens=2).finished)
    (answer,) = answers(whole)

    assert answer.prompt_info.num_prompt_tokens == 3
    assert (answer.outputs.text, answer.outputs.num_tokens) == ("ab", 2)
    assert answer.outputs.finish_info.num_output_tokens == 2


def test_text_without_tokens_waits_for_some() -> None:
    """Dynamo drops a message that has none, with its text."""
    pieces = answers(STARTED, Delta(text="a"), Delta(text="b", token_ids=(1,)), Delta(text="c"), finished())

    assert [piece.outputs.text for piece in pieces] == ["", "ab", "c"]
    assert [piece.outputs.num_tokens for piece in pieces] == [0, 1, 0]


def test_text_and_token_ids_are_there_when_they_are_asked_for() -> None:
    (silent,) = answers(token(1), response={"output_text": False})
    (ids,) = answers(token(1), response={"output_text": False, "output_token_ids": True})
    (text,) = answers(token(1), response={"output_text": True})

    assert silent == Response(outputs={"num_tokens": 1})
    assert ids == Response(outputs={"num_tokens": 1, "token_ids": [1]})
    assert text == Response(outputs={"num_tokens": 1, "text": "t1 "})


def test_log_probabilities_have_ranks_and_rivals() -> None:
    """A rival is not the token itself, and a token below all that were looked at has no rank."""
    top = ((4, -0.5), (5, -1.0), (6, -2.0))
    wanted = {"output_logprobs": True, "output_candidates": {"top_n": 2}}
    second, below = answers(scored(5, *top), scored(9, *top, logprob=-7.0), response=wanted)

    assert list(second.outputs.logprobs) == [-1.0]
    assert list(second.outputs.ranks) == [2]
    (rivals,) = second.outputs.candidate_tokens
    assert [(one.id, one.logprob, one.rank) for one in rivals.tokens] == [(4, -0.5, 1)]
    assert list(below.outputs.ranks) == [0]
    (rivals,) = below.outputs.candidate_tokens
    assert [(one.id, one.rank) for one in rivals.tokens] == [(4, 1), (5, 2)]


def test_every_token_has_its_list_of_rivals_even_if_it_is_empty() -> None:
    """Dynamo counts them."""
    wanted = {"output_logprobs": True, "output_candidates": {"top_n": 0}}
    (answer,) = answers(scored(5, (5, -0.1)), response=wanted)

    assert [list(one.tokens) for one in answer.outputs.candidate_tokens] == [[]]


def test_log_probabilities_are_there_only_if_they_are_asked_for() -> None:
    (answer,) = answers(scored(5, (5, -0.1)))

    assert (list(answer.outputs.logprobs), list(answer.outputs.ranks)) == ([], [])
    assert list(answer.outputs.candidate_tokens) == []


@pytest.mark.parametrize(
    ("reason", "theirs"),
    [
        (FinishReason.STOP, FinishInfo.STOP),
        (FinishReason.LENGTH, FinishInfo.LENGTH),
        (FinishReason.CANCELLED, FinishInfo.ABORTED),
        (FinishReason.DEADLINE, FinishInfo.ABORTED),
    ],
)
def test_every_end_has_a_reason_of_theirs(reason: FinishReason, theirs: int) -> None:
    (answer,) = answers(finished(reason))

    assert answer.outputs.finish_info.finish_reason == theirs


@pytest.mark.parametrize(
    ("matched", "expected"),
    [
        ({}, {}),
        ({"stop_string": "end"}, {"stop_string": "end"}),
        ({"stop_token_id": 7}, {"stop_token_id": 7}),
        ({"stop_token_id": 0}, {"eos_token_id": 0}),
    ],
    ids=["nothing", "string", "token", "end-of-sequence"],
)
def test_what_stopped_it_is_told(matched: dict[str, object], expected: dict[str, object]) -> None:
    (answer,) = answers(finished(FinishReason.STOP, **matched), stopping={"stop_token_ids": [7]})

    assert answer.outputs.finish_info == FinishInfo(finish_reason=FinishInfo.STOP, **expected)
