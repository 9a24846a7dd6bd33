"""The sampler's rules against expectations worked out by hand, and its independence from everything but its own row."""

import hashlib
import math
import random
from collections import Counter

import numpy as np
import pytest
import torch

from gralora_runtime.errors import InvalidRequestError
from gralora_runtime.request import ResponseParams, SamplingParams, StoppingParams
from gralora_runtime.sampling.host import sample
from gralora_runtime.sampling.outcome import RowFailure, SampledToken, SamplingFailure
from gralora_runtime.sampling.state import SamplerState, _heaviest

GREEDY = SamplingParams(temperature=0)
PROBABILITIES = (0.4, 0.3, 0.2, 0.1)
# Upper 0.1 % points of chi-square by degrees of freedom. Seeds are fixed, so a pass is a pass for ever.
CHI_SQUARE_LIMITS = {1: 10.83, 2: 13.82, 3: 16.27, 4: 18.47, 15: 37.70, 39: 72.05, 63: 103.44}


def make_state(params=GREEDY, *, stopping=None, response=None, seed=0, prompt=(), eos=(), vocab_size=4) -> SamplerState:
    return SamplerState(
        params,
        stopping or StoppingParams(),
        response or ResponseParams(),
        seed=seed,
        prompt_token_ids=prompt,
        eos_token_ids=eos,
        vocab_size=vocab_size,
    )


def logits_of(probabilities) -> torch.Tensor:
    return torch.tensor([probabilities]).log()


def generate(state: SamplerState, logits: torch.Tensor, num_tokens: int) -> list[int]:
    tokens = []
    for _ in range(num_tokens):
        [sampled] = sample(logits, [state])
        assert isinstance(sampled, SampledToken)
        state.observe(sampled.token_id)
        tokens.append(sampled.token_id)
    return tokens


def assert_distributed(expected, tokens) -> None:
    counts = Counter(tokens)
    total = sum(expected)
    possible = {i: len(tokens) * weight / total for i, weight in enumerate(expected) if weight}
    statistic = sum((counts[i] - number) ** 2 / number for i, number in possible.items())

    assert set(counts) <= set(possible)
    assert len(possible) == 1 or statistic < CHI_SQUARE_LIMITS[len(possible) - 1]


# Each case names the weights of the tokens that must be left, worked out from 0.4, 0.3, 0.2, 0.1.
FILTERS = {
    "nothing": (SamplingParams(), (4, 3, 2, 1)),
    "temperature_squares": (SamplingParams(temperature=0.5), (16, 9, 4, 1)),
    "temperature_flattens": (SamplingParams(temperature=2.0), tuple(math.sqrt(p) for p in PROBABILITIES)),
    "tiny_temperature_is_greedy": (SamplingParams(temperature=1e-300), (1, 0, 0, 0)),
    "top_k": (SamplingParams(top_k=2), (4, 3, 0, 0)),
    "top_k_1": (SamplingParams(top_k=1), (1, 0, 0, 0)),
    "top_k_beyond_vocabulary": (SamplingParams(top_k=100), (4, 3, 2, 1)),
    "top_p_includes_the_token_that_crosses": (SamplingParams(top_p=0.6), (4, 3, 0, 0)),
    "top_p_more": (SamplingParams(top_p=0.71), (4, 3, 2, 0)),
    "top_p_0_keeps_the_likeliest": (SamplingParams(top_p=0.0), (1, 0, 0, 0)),
    "top_p_after_temperature": (SamplingParams(temperature=0.5, top_p=0.52), (1, 0, 0, 0)),  # 16/30 = 0.533
    "top_p_of_what_top_k_left": (SamplingParams(top_k=3, top_p=0.75), (4, 3, 0, 0)),  # 7/9 = 0.78; else 0.7 < 0.75
    "min_p": (SamplingParams(min_p=0.45), (4, 3, 2, 0)),
    "min_p_1_keeps_the_likeliest": (SamplingParams(min_p=1.0), (1, 0, 0, 0)),
    "min_p_after_temperature": (SamplingParams(temperature=0.5, min_p=0.6), (1, 0, 0, 0)),  # (3/4) ** 2 = 0.56
    "min_p_after_top_p": (SamplingParams(top_p=0.55, min_p=0.6), (4, 3, 0, 0)),  # before it: 4/7 = 0.57 is enough
}


@pytest.mark.parametrize(("params", "expected"), FILTERS.values(), ids=FILTERS)
def test_filters_leave_the_right_distribution(params, expected):
    tokens = generate(make_state(params, seed=17), logits_of(PROBABILITIES), 3000)

    assert_distributed(expected, tokens)


def test_first_tokens_of_many_seeds_follow_the_distribution():
    logits = logits_of(PROBABILITIES)
    tokens = [generate(make_state(SamplingParams(), seed=seed), logits, 1)[0] for seed in range(3000)]

    assert_distributed(PROBABILITIES, tokens)


@pytest.mark.parametrize(("temperature", "top_k"), [(0.7, 0), (1.0, 40), (1.6, 0)])
def test_many_tokens_are_drawn_as_often_as_the_softmax_of_their_penalised_scores_says(temperature, top_k):
    params = SamplingParams(
        temperature=temperature,
        top_k=top_k,
        repetition_penalty=1.2,
        presence_penalty=0.8,
        frequency_penalty=0.2,
        logit_bias={7: 0.5},
    )
    logits = exact_logits(key=1, num_rows=1, vocab_size=64) / 8  # 0 to 2, so that every token is drawn often enough
    logits[0, [3, 5, 7]] = 5
    scores = logits[0].astype(np.float64)
    scores[7] += 0.5
    scores[[3, 5, 7]] /= 1.2
    scores[[5, 7]] -= [3 * 0.2 + 0.8, 0.2 + 0.8]
    weights = np.exp(scores / temperature)
    if top_k:
        weights[np.argsort(weights)[:-top_k]] = 0
    tokens = []
    for seed in range(4000):
        state = make_state(params, seed=seed, prompt=[3], vocab_size=64)
        for written in (5, 7, 5, 5):
            state.observe(written)
        tokens += generate(state, torch.from_numpy(logits), 1)

    assert len(tokens) * weights[weights > 0].min() / weights.sum() >= 5  # what chi-square needs
    assert_distributed(weights.tolist(), tokens)


def test_consecutive_draws_are_independent():
    tokens = generate(make_state(SamplingParams(), seed=3), logits_of(PROBABILITIES), 6000)
    pairs = [4 * first + second for first, second in zip(tokens[::2], tokens[1::2], strict=True)]

    assert_distributed([p * q for p in PROBABILITIES for q in PROBABILITIES], pairs)


def test_filters_break_ties_towards_the_lowest_token_id():
    logits = torch.zeros(1, 4)

    assert {0, 1} == set(generate(make_state(SamplingParams(top_k=2)), logits, 100))
    assert {0, 1} == set(generate(make_state(SamplingParams(top_p=0.5)), logits, 100))


def test_greedy_breaks_ties_towards_the_lowest_token_id_on_both_paths():
    logits = torch.tensor([[1.0, 3.0, 3.0, 3.0]])
    reporting = ResponseParams(logprobs=True)

    assert [SampledToken(1)] == sample(logits, [make_state()])
    assert generate(make_state(response=reporting), logits, 1) == [1]


def test_the_random_stream_never_changes():
    """A seed is a promise across releases: these were drawn once and must stay."""
    tokens = generate(make_state(SamplingParams(), seed=42, vocab_size=1000), torch.zeros(1, 1000), 6)

    assert tokens == [820, 368, 876, 66, 986, 967]


# What was drawn before any parameter was bounded to float32: the first digits of a SHA-256 of 600 tokens each.
ORDINARY: dict[str, tuple[SamplingParams, str]] = {
    "greedy": (SamplingParams(temperature=0), "3ea90be87ea690e3"),
    "plain": (SamplingParams(), "b985fa16d9cb794f"),
    "temperature": (SamplingParams(temperature=0.7), "e64c408b5b82adc9"),
    "hot": (SamplingParams(temperature=1.6), "cf50228485cd84a6"),
    "top_k": (SamplingParams(top_k=40), "0c121060cf3675cc"),
    "top_p": (SamplingParams(top_p=0.9), "c44fb4af7e7cf204"),
    "min_p": (SamplingParams(min_p=0.05), "8f0ed3c838f0be53"),
    "all_filters": (SamplingParams(temperature=0.7, top_k=40, top_p=0.9, min_p=0.05), "7ab99a6d5a3ed3c8"),
    "repetition": (SamplingParams(temperature=0.8, repetition_penalty=1.2), "e0ce4a0a4ba80664"),
    "presence_and_frequency": (
        SamplingParams(temperature=0.8, presence_penalty=0.6, frequency_penalty=0.3),
        "30c4103dc60a89ba",
    ),
    "encouraging": (
        SamplingParams(presence_penalty=-0.5, frequency_penalty=-0.1, repetition_penalty=0.9),
        "f011cbcb90fc7352",
    ),
    "greedy_with_penalties": (
        SamplingParams(temperature=0, repetition_penalty=1.3, frequency_penalty=0.5),
        "ee68e37dce189c48",
    ),
    "bias": (
        SamplingParams(temperature=0.9, top_p=0.95, logit_bias={3: 4.0, 250: -100.0, 256: 1.5}),
        "2e5f2da28baeade2",
    ),
}
NUM_REQUESTS, NUM_STEPS, ORDINARY_VOCAB = 20, 30, 257


@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_settings_draw_the_tokens_that_they_always_drew(name):
    params, expected = ORDINARY[name]
    states = [
        make_state(
            params,
            stopping=StoppingParams(min_tokens=row % 3),
            seed=1000 + row,
            prompt=[row, 2 * row],
            eos=[row],
            vocab_size=ORDINARY_VOCAB,
        )
        for row in range(NUM_REQUESTS)
    ]
    drawn = hashlib.sha256()
    for step in range(NUM_STEPS):
        sampled = sample(torch.from_numpy(exact_logits(step, NUM_REQUESTS, ORDINARY_VOCAB)), states)
        for state, result in zip(states, sampled, strict=True):
            state.observe(result.token_id)
            drawn.update(result.token_id.to_bytes(2, "little"))

    assert expected == drawn.hexdigest()[:16]


def exact_logits(key: int, num_rows: int, vocab_size: int) -> np.ndarray:
    """Numbers in 0..16 that are the same on every machine and exact in float32."""
    raw = np.random.Philox(key=key).random_raw(num_rows * vocab_size)
    return (raw >> np.uint64(44)).astype(np.float32).reshape(num_rows, vocab_size) * np.float32(2.0**-16)


def test_seeds_outside_64_bits_and_negative_ones_are_taken_modulo_2_64():
    logits = torch.zeros(1, 1000)
    expected = generate(make_state(SamplingParams(), seed=5, vocab_size=1000), logits, 5)

    assert expected == generate(make_state(SamplingParams(), seed=5 - 2**64, vocab_size=1000), logits, 5)
    assert expected != generate(make_state(SamplingParams(), seed=6, vocab_size=1000), logits, 5)


@pytest.mark.parametrize("scale", [0.0, 0.1, 3.0, 40.0])
@pytest.mark.parametrize("size", [1, 2, 997, 5003])
def test_heaviest_agrees_with_a_full_sort(size, scale):
    generator = np.random.default_rng(size)
    weights = np.exp(-scale * generator.random(size)).astype(np.float32)
    weights[generator.random(size) < 0.2] = weights[0]  # ties
    order = np.lexsort((np.arange(size), -weights))
    for share in (0.0, 0.001, 0.3, 0.9, 0.9999):
        target = share * weights.sum(dtype=np.float64)
        num_kept = int((weights[order].cumsum(dtype=np.float64) < target).sum()) + 1

        assert sorted(order[:num_kept]) == _heaviest(weights, weights, target).tolist()


# --- penalties, bias, bans: greedy, so that the effect on the scores can be read off


def test_repetition_penalty_divides_positive_and_multiplies_negative_scores():
    params = SamplingParams(temperature=0, repetition_penalty=1.5)

    assert generate(make_state(params, prompt=[0, 0]), torch.tensor([[2.0, 1.4, 0.0, 0.0]]), 1) == [1]  # 2/1.5 = 1.33
    assert generate(make_state(params, prompt=[0, 0]), torch.tensor([[2.0, 1.3, 0.0, 0.0]]), 1) == [0]
    assert generate(make_state(params, prompt=[0]), torch.tensor([[-1.0, -1.4, -9.0, -9.0]]), 1) == [1]  # -1.5
    assert generate(make_state(params, prompt=[0]), torch.tensor([[-1.0, -1.6, -9.0, -9.0]]), 1) == [0]


def test_repetition_penalty_covers_the_output_once():
    params = SamplingParams(temperature=0, repetition_penalty=2.0)

    # 4 -> 2; then 3 -> 1.5; from then on both are penalised, once.
    assert generate(make_state(params), torch.tensor([[4.0, 3.0, 0.0, 0.0]]), 4) == [0, 1, 0, 0]


def test_presence_penalty_counts_a_written_token_once_and_ignores_the_prompt():
    params = SamplingParams(temperature=0, presence_penalty=0.5)

    # 1.0 -> 0.5; then 0.6 -> 0.1; then nothing changes any more.
    assert generate(make_state(params, prompt=[0, 0]), torch.tensor([[1.0, 0.6, -9.0, -9.0]]), 4) == [0, 1, 0, 0]


def test_frequency_penalty_adds_up_and_ignores_the_prompt():
    params = SamplingParams(temperature=0, frequency_penalty=0.3)

    # token 0: 1.0, 0.7, 0.4, 0.1; token 1: 0.6, 0.3
    assert generate(make_state(params, prompt=[0]), torch.tensor([[1.0, 0.6, -9.0, -9.0]]), 5) == [0, 0, 1, 0, 1]


def test_negative_penalties_encourage():
    params = SamplingParams(temperature=0, presence_penalty=-1.0)
    state = make_state(params)
    state.observe(1)

    assert generate(state, torch.tensor([[1.0, 0.5, 0.0, 0.0]]), 1) == [1]


def test_logit_bias_is_added():
    logits = torch.tensor([[1.0, 0.0, 0.0, 0.0]])

    assert generate(make_state(SamplingParams(temperature=0, logit_bias={2: 1.5})), logits, 1) == [2]
    assert generate(make_state(SamplingParams(temperature=0, logit_bias={0: -100.0})), logits, 1) == [1]


def test_logit_bias_comes_before_the_repetition_penalty():
    params = SamplingParams(temperature=0, logit_bias={0: 1.0}, repetition_penalty=2.0)

    # (1 + 1) / 2 = 1.0 < 1.2; the other way round it would be 1 / 2 + 1 = 1.5
    assert generate(make_state(params, prompt=[0]), torch.tensor([[1.0, 1.2, 0.0, 0.0]]), 1) == [1]


@pytest.mark.parametrize("token_id", [-1, 4])
def test_logit_bias_outside_the_vocabulary_is_an_error(token_id):
    with pytest.raises(InvalidRequestError, match=r"sampling.logit_bias: token ids must be in 0\.\.3 \(got"):
        make_state(SamplingParams(logit_bias={token_id: 1.0}))


@pytest.mark.parametrize("ignore_eos", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_min_tokens_bans_every_end_until_enough_tokens_exist(ignore_eos, temperature):
    stopping = StoppingParams(min_tokens=2, stop_token_ids=(1, 99), ignore_eos=ignore_eos)
    params = SamplingParams(temperature=temperature, logit_bias={0: 50.0})
    state = make_state(params, stopping=stopping, eos=[0])

    assert generate(state, torch.tensor([[90.0, 80.0, 70.0, 0.0]]), 3) == [2, 2, 0]


def test_ignore_eos_alone_bans_nothing():
    state = make_state(stopping=StoppingParams(ignore_eos=True), eos=[0])

    assert generate(state, torch.tensor([[9.0, 1.0, 0.0, 0.0]]), 1) == [0]


# --- log-probabilities


def test_logprobs_are_those_of_the_raw_distribution():
    params = SamplingParams(temperature=0.3, top_k=1, logit_bias={0: -100.0}, repetition_penalty=3.0)
    state = make_state(params, response=ResponseParams(logprobs=True, top_logprobs=3), prompt=[0])

    [sampled] = sample(logits_of(PROBABILITIES), [state])

    assert 1 == sampled.token_id == sampled.logprob.token_id
    assert math.log(0.3) == pytest.approx(sampled.logprob.logprob, abs=1e-6)
    assert tuple(token_id for token_id, _ in sampled.logprob.top) == (0, 1, 2)
    assert [math.log(p) for p in (0.4, 0.3, 0.2)] == pytest.approx([lp for _, lp in sampled.logprob.top], abs=1e-6)


def test_logprobs_without_alternatives_have_an_empty_top():
    [sampled] = sample(logits_of(PROBABILITIES), [make_state(response=ResponseParams(logprobs=True))])

    assert sampled.logprob.top == ()


def test_top_logprobs_order_ties_by_token_id_and_end_with_the_vocabulary():
    state = make_state(response=ResponseParams(logprobs=True, top_logprobs=20))

    [sampled] = sample(torch.tensor([[1.0, 2.0, 2.0, 1.0]]), [state])

    assert [token_id for token_id, _ in sampled.logprob.top] == [1, 2, 0, 3]


def test_top_logprobs_cut_ties_by_token_id():
    state = make_state(response=ResponseParams(logprobs=True, top_logprobs=2))

    [sampled] = sample(torch.tensor([[1.0, 2.0, 1.0, 1.0]]), [state])

    assert [token_id for token_id, _ in sampled.logprob.top] == [1, 0]


def test_logprobs_agree_with_log_softmax():
    logits = torch.randn(1, 5003, generator=torch.Generator().manual_seed(0)) * 5
    expected = torch.log_softmax(logits.double(), dim=-1)[0]
    state = make_state(response=ResponseParams(logprobs=True, top_logprobs=20), vocab_size=5003)

    [sampled] = sample(logits, [state])

    values, ids = expected.topk(20)
    assert ids.tolist() == [token_id for token_id, _ in sampled.logprob.top]
    assert values.tolist() == pytest.approx([lp for _, lp in sampled.logprob.top], abs=2e-6)


def test_top_logprobs_far_below_the_peak_keep_their_order():
    state = make_state(response=ResponseParams(logprobs=True, top_logprobs=3))

    [sampled] = sample(torch.tensor([[-900.0, -800.0, -700.0, 0.0]]), [state])

    assert sampled.logprob.top == ((3, 0.0), (2, -700.0), (1, -800.0))


# --- rows that cannot be sampled


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    "row", [[0.0, math.nan, 1.0, 2.0], [0.0, math.inf, 1.0, 2.0], [-math.inf] * 4], ids=["nan", "inf", "all_minus_inf"]
)
def test_a_broken_row_fails_alone(row, temperature):
    params = SamplingParams(temperature=temperature)
    good = [0.0, 0.5, 1.0, 5.0]
    expected = sample(torch.tensor([good]), [make_state(params, seed=1)])[0]

    before, broken, after = sample(torch.tensor([good, row, good]), [make_state(params, seed=s) for s in (1, 2, 1)])

    assert expected == before == after
    assert isinstance(broken, SamplingFailure)
    assert "largest logit is" in broken.problem


def test_a_row_without_any_allowed_token_fails():
    state = make_state(stopping=StoppingParams(min_tokens=1), eos=range(4))

    [result] = sample(torch.zeros(1, 4), [state])

    assert SamplingFailure("no token is left to choose from: the largest score is -inf") == result


def test_scores_that_overflow_fail_instead_of_drawing_anything():
    state = make_state(SamplingParams(logit_bias={0: 3e38}))

    [result] = sample(torch.tensor([[3e38, 0.0, 0.0, 0.0]]), [state])

    assert isinstance(result, SamplingFailure)


def test_tokens_masked_with_minus_infinity_are_never_drawn():
    params = SamplingParams(temperature=5.0, repetition_penalty=1.3, top_p=0.99)
    logits = torch.tensor([[-math.inf, 0.0, 0.0, -math.inf]])

    assert {1, 2} == set(generate(make_state(params, prompt=[0, 1]), logits, 200))


@pytest.mark.parametrize(("uniform", "expected"), [(0.0, 1), (1 - 2.0**-53, 2)])
def test_the_ends_of_the_random_interval_hit_tokens_that_are_possible(monkeypatch, uniform, expected):
    monkeypatch.setattr(SamplerState, "_uniform", lambda state: uniform)

    assert generate(make_state(SamplingParams()), torch.tensor([[-math.inf, 0.3, 0.1, -math.inf]]), 1) == [expected]


# --- rows that our own code fails on


class Panic(BaseException):
    """Like those of Rust's libraries, which are no `Exception`."""


class FailsWhenAsked(SamplerState):
    error: BaseException = ZeroDivisionError("ours")

    @property
    def takes_argmax(self) -> bool:
        raise self.error


class FailsWhenChoosing(SamplerState):
    error: BaseException = ZeroDivisionError("ours")
    takes_argmax = False

    def choose(self, logits):
        raise self.error


def failing(kind, error) -> SamplerState:
    state = make_state()
    state.__class__ = kind
    state.error = error
    return state


@pytest.mark.parametrize("error", [ZeroDivisionError("ours"), MemoryError(), Panic("ours")], ids=repr)
@pytest.mark.parametrize("kind", [FailsWhenAsked, FailsWhenChoosing])
def test_a_row_that_our_own_code_fails_on_fails_alone(kind, error):
    good = [make_state(), make_state(SamplingParams(), seed=3), make_state(response=ResponseParams(logprobs=True))]
    logits = logits_of(PROBABILITIES)
    expected = [sample(logits, [state])[0] for state in good]

    *first, failure, last = sample(logits.repeat(4, 1), [good[0], good[1], failing(kind, error), good[2]])

    assert failure == RowFailure(error)
    assert expected == [*first, last]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(), GeneratorExit()], ids=repr)
@pytest.mark.parametrize("kind", [FailsWhenAsked, FailsWhenChoosing])
def test_what_is_to_end_the_process_is_not_kept_to_a_row(kind, error):
    with pytest.raises(type(error)):
        sample(torch.zeros(2, 4), [make_state(), failing(kind, error)])


def test_a_row_for_another_vocabulary_fails_alone():
    token, failure = sample(logits_of(PROBABILITIES).repeat(2, 1), [make_state(), make_state(vocab_size=5)])

    assert token == SampledToken(0)
    assert isinstance(failure, RowFailure)
    assert "4 logits for a request with 5" in str(failure.cause)


# --- independence

VARIED = [
    SamplingParams(temperature=0),
    SamplingParams(),
    SamplingParams(temperature=0.7, top_p=0.9),
    SamplingParams(temperature=1.3, top_k=50, min_p=0.02),
    SamplingParams(temperature=0.9, repetition_penalty=1.2),
    SamplingParams(temperature=0, presence_penalty=0.4, frequency_penalty=0.2),
    SamplingParams(temperature=1.0, logit_bias={5: 4.0, 7: -100.0}),
]
ODD_VOCAB = 1009  # a prime, so that rows of a batch start at every alignment


def varied_state(row: int) -> SamplerState:
    return make_state(
        VARIED[row % len(VARIED)],
        stopping=StoppingParams(min_tokens=row % 3),
        response=ResponseParams(logprobs=row % 2 == 0, top_logprobs=row % 5),
        seed=1000 + row,
        prompt=[row, row + 1],
        eos=[row],
        vocab_size=ODD_VOCAB,
    )


def random_logits(seed: int, num_rows: int) -> torch.Tensor:
    return torch.randn(num_rows, ODD_VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def test_a_row_gets_the_same_result_alone_and_among_31_others_in_any_order():
    alone, together = ([varied_state(row) for row in range(32)] for _ in range(2))
    order = list(range(32))
    shuffle = random.Random(0).shuffle
    for step in range(6):
        logits = random_logits(step, 32)
        shuffle(order)

        expected = [sample(logits[row : row + 1].clone(), [alone[row]])[0] for row in range(32)]
        batch = sample(logits[order], [together[row] for row in order])

        assert [expected[row] for row in order] == batch  # log-probabilities included, to the last bit
        for row in range(32):
            alone[row].observe(expected[row].token_id)
            together[row].observe(expected[row].token_id)


@pytest.mark.parametrize("row", range(len(VARIED)))
def test_a_request_recreated_after_a_preemption_goes_on_as_if_nothing_had_happened(row):
    steps = [random_logits(step, 1) for step in range(12)]
    state = varied_state(row)
    expected = []
    for logits in steps:
        expected += sample(logits, [state])
        state.observe(expected[-1].token_id)

    resumed = varied_state(row)
    for sampled in expected[:5]:
        resumed.observe(sampled.token_id)
    actual = []
    for logits in steps[5:]:
        actual += sample(logits, [resumed])
        resumed.observe(actual[-1].token_id)

    assert expected[5:] == actual


def test_sampling_twice_without_observing_gives_the_same_token():
    logits = random_logits(0, 1)
    state = varied_state(1)

    assert sample(logits, [state]) == sample(logits, [state])


def test_logits_are_not_changed():
    logits = random_logits(0, 7)
    before = logits.clone()

    sample(logits, [varied_state(row) for row in range(7)])

    assert torch.equal(before, logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_logits_are_sampled_as_their_float32_values(dtype):
    logits = random_logits(0, 7).to(dtype)

    expected = sample(logits.float(), [varied_state(row) for row in range(7)])
    assert expected == sample(logits, [varied_state(row) for row in range(7)])


def test_an_empty_step_has_no_tokens():
    assert sample(torch.empty(0, 4), []) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_logits_on_a_gpu_are_sampled_as_their_copies_on_the_host():
    logits = random_logits(0, 32)
    logits[7, 3:9] = 99.0  # ties, in a row that takes the argmax
    logits[14, 5] = math.nan

    expected = sample(logits, [varied_state(row) for row in range(32)])
    plain = sample(logits, [make_state(vocab_size=ODD_VOCAB) for _ in range(32)])
    assert expected == sample(logits.cuda(), [varied_state(row) for row in range(32)])
    assert plain == sample(logits.cuda(), [make_state(vocab_size=ODD_VOCAB) for _ in range(32)])
