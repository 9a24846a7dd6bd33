"""Wrong tokens stop a run, whatever is wrong with them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.tiny_models import VOCAB_SIZE, tiny_model

from benchmarks.adapters import AdapterSet, Merger
from benchmarks.gate import Gate, GateRedError
from benchmarks.measurement import Answer, Run
from benchmarks.rivals import generate
from benchmarks.workload import Request, make_prompts, make_requests

NUM_TOKENS = 5


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The base model and a merged one, by adapter."""
    base = tiny_model("llama")
    adapters = AdapterSet(tmp_path_factory.mktemp("adapters"))
    (name,) = adapters.add_gralora(base, 1, rank=16, k=2)
    return {"": base, "customer": Merger(base).keep(adapters.path(name))}


@pytest.fixture
def gate(models):
    return Gate(models.__getitem__, same_as={"converted": "customer"})


def requests(adapter: str) -> list[Request]:
    return make_requests(make_prompts(3, 7, VOCAB_SIZE), [adapter], NUM_TOKENS)


def with_token(answer: Answer, position: int, token: int) -> Answer:
    tokens = (*answer.tokens[:position], token, *answer.tokens[position + 1 :])
    return replace(answer, tokens=tokens)


def test_green_for_what_transformers_generates(gate, models):
    for adapter, model in models.items():
        gate.check(generate(model, requests(adapter)))

    assert gate.num_checked == 6


@pytest.mark.parametrize("position", range(NUM_TOKENS))
def test_red_for_one_wrong_token_anywhere(gate, models, position):
    answers = generate(models["customer"], requests("customer")).answers
    wrong = with_token(answers[1], position, (answers[1].tokens[position] + 1) % VOCAB_SIZE)

    with pytest.raises(GateRedError, match=f"token {position} is"):
        gate.check(Run((answers[0], wrong)))


def test_red_for_the_base_models_answer_in_an_adapters_name(gate, models):
    with pytest.raises(GateRedError, match="customer"):
        gate.check(generate(models[""], requests("customer")))


def test_red_for_an_answer_that_is_too_short(gate, models):
    (answer, *_) = generate(models[""], requests("")).answers

    with pytest.raises(GateRedError, match="gave 4 of 5 tokens"):
        gate.check(Run((replace(answer, tokens=answer.tokens[:-1]),)))


def test_red_in_a_later_round_too(gate, models):
    """That the first round was right excuses nothing."""
    run = generate(models[""], requests(""))
    gate.check(run)
    wrong = with_token(run.answers[0], 2, (run.answers[0].tokens[2] + 1) % VOCAB_SIZE)

    with pytest.raises(GateRedError):
        gate.check(Run((wrong,)))


def test_a_converted_adapter_answers_for_its_source(gate, models):
    gate.check(generate(models["customer"], requests("converted")))

    with pytest.raises(GateRedError):
        gate.check(generate(models[""], requests("converted")))


def test_a_tie_may_go_either_way_but_what_follows_it_is_checked(models):
    """Two tokens with the same row in the head have the same logit."""
    model = models[""]
    (answer,) = generate(model, requests("")[:1]).answers
    twin = next(token for token in range(3, VOCAB_SIZE) if token not in answer.tokens)
    head = model.get_output_embeddings().weight
    original = head[twin].clone()
    with torch.no_grad():
        head[twin] = head[answer.tokens[0]]
    try:
        gate = Gate(lambda _: model)
        # After the other twin the prefix is another one, so go on from it.
        rest = replace(answer.request, prompt=(*answer.request.prompt, twin), max_tokens=NUM_TOKENS - 1)
        (after,) = generate(model, [rest]).answers
        flipped = replace(answer, tokens=(twin, *after.tokens))
        gate.check(Run((flipped,)))

        with pytest.raises(GateRedError, match="token 3 is"):
            gate.check(Run((with_token(flipped, 3, (flipped.tokens[3] + 1) % VOCAB_SIZE),)))
    finally:
        with torch.no_grad():
            head[twin] = original
