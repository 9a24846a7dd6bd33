"""The sampler is total: whatever finite parameters meet whatever logits, a row gets a token or a failure that says why.

The engine's Python API validates nothing, so neither do these. Warnings of numpy are errors in all tests.
"""

import math
import random

import numpy as np
import pytest
import torch

from gralora_runtime.request import ResponseParams, SamplingParams, StoppingParams
from gralora_runtime.sampling.host import sample
from gralora_runtime.sampling.outcome import RowFailure, SampledToken, SamplingFailure
from gralora_runtime.sampling.state import SamplerState

BIG, TINY, SMALLEST = float(np.finfo(np.float32).max), float(np.finfo(np.float32).tiny), 5e-324
NAN, INF = math.nan, math.inf
BEYOND = (1e39, -1e39, 1e308, -1e308, SMALLEST, -SMALLEST)  # of float32, at either end

TEMPERATURES = (0.0, -0.0, -1.0, 1e-30, TINY, 0.7, 1.0, 1.0, 50.0, BIG, *BEYOND)
TOP_PS = (1.0, 1.0, 0.9, 0.5, 0.0, -0.5, 2.0, *BEYOND)
TOP_KS = (0, 0, 1, 2, 40, -1, 2**31 - 1, -(2**31), 10**30)
MIN_PS = (0.0, 0.0, 0.05, 0.999999999, 1.0, 1.5, -0.1, *BEYOND)
REPETITIONS = (1.0, 1.0, 1.2, 0.5, 0.0, -0.0, -1.0, TINY, BIG, *BEYOND)
PENALTIES = (0.0, 0.0, 0.5, -2.0, 1e38, -BIG, BIG, *BEYOND)
BIASES = (0.0, 1.5, -100.0, BIG, -BIG, 1e300, -1e300, SMALLEST)
MIN_TOKENS = (0, 0, 1, 3, 10**12, -1)
NUM_TOPS = (None, None, 0, 1, 20, 10**6, -1)  # None: no logprobs
SEEDS = (0, -1, 2**64, 10**30)

VOCABS = (*range(1, 65), 300, 1009)
ROWS, STEPS, BATCHES = 50, 4, 50  # x 10 chunks: 100,000 draws


def logits_row(pick: random.Random, size: int) -> list[float]:
    kind = pick.randrange(14)
    if kind < 4:
        return [pick.gauss(0, (1, 5, 100, 1e37)[kind]) for _ in range(size)]
    if kind < 6:  # ranges that overflow in float32, also with -inf
        return [pick.choice((3e38, -3e38, BIG, -BIG, 0.0, -INF)[: 4 + kind % 2 * 2]) for _ in range(size)]
    if kind == 6:  # ties
        return [pick.choice((-1.0, 0.0, -0.0, 1.0)) for _ in range(size)]
    if kind == 7:
        return [pick.choice((0.0, 1.0, BIG, -BIG, -INF, INF, NAN, TINY, 1e-45))] * size
    if kind == 8:
        return [pick.choice((1e-45, -1e-45, TINY, -TINY, 0.0)) for _ in range(size)]
    row = [pick.gauss(0, 3) for _ in range(size)]
    if kind == 9:  # all but one are masked
        row = [-INF] * size
        row[pick.randrange(size)] = pick.choice((0.0, 5.0, -BIG, BIG))
    elif kind == 10:
        row[pick.randrange(size)] = pick.choice((NAN, INF, -INF, BIG))
    elif kind < 13:  # some are masked
        row = [-INF if pick.random() < 0.5 else value for value in row]
    return row


def state(pick: random.Random, vocab_size: int) -> SamplerState:
    def ids(most: int) -> list[int]:
        return [pick.randrange(vocab_size) for _ in range(pick.randrange(most))]

    def penalties() -> bool:  # in half of the requests, so that the others have a chance of a token
        return pick.random() < 0.5

    params = SamplingParams(
        temperature=pick.choice(TEMPERATURES),
        top_p=pick.choice(TOP_PS),
        top_k=pick.choice(TOP_KS),
        min_p=pick.choice(MIN_PS),
        repetition_penalty=pick.choice(REPETITIONS) if penalties() else 1.0,
        presence_penalty=pick.choice(PENALTIES) if penalties() else 0.0,
        frequency_penalty=pick.choice(PENALTIES) if penalties() else 0.0,
        logit_bias={token_id: pick.choice(BIASES) for token_id in ids(4)} if penalties() else {},
    )
    num_top = pick.choice(NUM_TOPS)
    return SamplerState(
        params,
        StoppingParams(min_tokens=pick.choice(MIN_TOKENS), stop_token_ids=(*ids(2), -1, 2**80)),
        ResponseParams(logprobs=num_top is not None, top_logprobs=num_top or 0),
        seed=pick.choice(SEEDS),
        prompt_token_ids=ids(6),
        eos_token_ids=ids(2),
        vocab_size=vocab_size,
    )


def assert_valid(result: object, state: SamplerState, logits: np.ndarray) -> None:
    assert not isinstance(result, RowFailure), (result.cause, state._params, logits)
    if isinstance(result, SamplingFailure):
        assert "largest" in result.problem
        return
    assert isinstance(result, SampledToken)
    assert 0 <= result.token_id < logits.size
    assert math.isfinite(logits[result.token_id])
    with np.errstate(all="ignore"):
        assert math.isfinite(state._adjusted(logits)[result.token_id])
    if state.num_top is None:
        assert result.logprob is None
        return
    values = [value for _, value in result.logprob.top]
    assert -INF < result.logprob.logprob < 1e-6
    assert len(values) == min(max(state.num_top, 0), logits.size)
    assert sorted(values, reverse=True) == values  # no NaN either
    assert len({token_id for token_id, _ in result.logprob.top}) == len(values)


@pytest.mark.parametrize("chunk", range(10))
def test_no_parameters_and_no_logits_make_anything_but_a_token_or_a_failure(chunk: int) -> None:
    pick = random.Random(chunk)
    num_tokens = 0
    for _ in range(BATCHES):
        vocab_size = pick.choice(VOCABS)
        states = [state(pick, vocab_size) for _ in range(ROWS)]
        rows = torch.tensor([logits_row(pick, vocab_size) for _ in range(ROWS)], dtype=torch.float32)
        for step in range(STEPS):
            logits = rows.roll(step, 0)
            for one, result, row in zip(states, sample(logits, states), logits.numpy(), strict=True):
                assert_valid(result, one, row)
                if isinstance(result, SampledToken):
                    num_tokens += 1
                    one.observe(result.token_id)

    assert num_tokens > BATCHES * STEPS * ROWS / 3
