"""Sampling on the device: the tokens of a seed are those of the host's sampler, whoever is beside a row."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from gralora_kernels.philox import uniforms
from gralora_kernels.reference import sampling as twin
from gralora_kernels.sampling_rules import RULE, SamplingRules, rule, with_biases
from gralora_kernels.triton_ops import sampling as kernels
from gralora_kernels.triton_ops import sampling_launch
from gralora_kernels.triton_ops.sampling_launch import RowSampler
from gralora_runtime.errors import InvalidRequestError
from gralora_runtime.request import ResponseParams, SamplingParams, StoppingParams
from gralora_runtime.sampling.outcome import SampledToken
from gralora_runtime.sampling.state import SamplerState

INF, NAN = math.inf, math.nan
CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")

TEMPERATURES = (0.0, 1e-38, 0.3, 0.7, 1.0, 1.0, 2.0, 5.0, 1e30)
TOP_KS = (0, 0, 1, 5, 40, 255, 256, 257, 300)
TOP_PS = (1.0, 1.0, 1e-300, 0.01, 0.5, 0.9, 0.95, 0.999, 1 - 1e-12, 1 - 2**-53)
MIN_PS = (0.0, 0.0, 1e-50, 0.001, 0.1, 0.9, 1.0)
REPETITIONS = (0.5, 1.0, 1.3, 10.0)
PENALTIES = (0.0, 0.3, -0.5, 2.0)
BIASES = (1.0, -1.0, 3.0, 1e38, -1e38, -INF)


@pytest.fixture(autouse=True)
def language_patched_once(monkeypatch):
    """The interpreter patches Triton's language anew for each call of a helper, which takes half of the time here."""
    patched = set()

    def call(function, *args, **kwargs):
        names = function.fn.__globals__
        if names.get("tl") is not tl and names["__name__"] not in patched:  # a kernel's own module is patched already
            interpreter._patch_lang(function.fn)
            patched.add(names["__name__"])
        return function.rewrite()(*args, **kwargs)

    monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", call)


@pytest.fixture(autouse=True)
def small_splits(monkeypatch):
    monkeypatch.setattr(sampling_launch, "SPLIT", 128)
    monkeypatch.setattr(sampling_launch, "BLOCK", 64)


@dataclass
class Masked:
    """In the place of a matcher: what it says of the next token."""

    mask: np.ndarray
    must_end: bool = False
    is_complete: bool = False

    def advance(self, token_id):
        """The same may follow again."""

    def refusal(self):
        return InvalidRequestError("structured_output.regex", "", "nothing is left")


class Requests:
    """Requests of one step: their rules, for the device, and a sampler of the host for each."""

    def __init__(self, vocab, params, *, prompts=None, bans=None, num_top=-1, slots=None, masks=None):
        """`masks`: by row, the tokens that may be chosen; rows without one may choose any."""
        self.vocab = vocab
        self.params = params
        self.seeds = np.arange(len(params), dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        prompts, bans = prompts or [[]] * len(params), bans or [[]] * len(params)
        self.states = [
            SamplerState(
                one,
                StoppingParams(stop_token_ids=tuple(banned), min_tokens=100),
                ResponseParams(logprobs=num_top >= 0, top_logprobs=max(num_top, 0)),
                seed=int(seed), prompt_token_ids=prompt, eos_token_ids=(), vocab_size=vocab,
            )
            for one, seed, prompt, banned in zip(params, self.seeds, prompts, bans, strict=True)
        ]  # fmt: skip
        names = [name for name in RULE.names if hasattr(params[0], name)]
        self.rows = np.concatenate([rule(**{n: getattr(one, n) for n in names}, num_top=num_top) for one in params])
        self.history = torch.zeros(len(params) + 2, vocab, dtype=torch.int32)
        slots = range(len(params)) if slots is None else slots
        for row, (slot, state, prompt) in enumerate(zip(slots, self.states, prompts, strict=True)):
            if state.history is not None:
                self.rows["history_slot"][row] = slot
                self.history[slot, prompt] = 1
        self.biases = [
            one.logit_bias | dict.fromkeys(banned, -INF) for one, banned in zip(params, bans, strict=True)
        ]  # fmt: skip
        self.sampler = RowSampler(vocab, len(params), CPU)
        self.masks = np.zeros((len(masks or ()), vocab // 32 + 2), np.int32)  # as of a vocabulary that is padded
        for place, (row, tokens) in enumerate((masks or {}).items()):
            bits = np.zeros(self.masks.shape[1] * 32, np.uint8)
            bits[tokens] = 1
            self.masks[place] = np.packbits(bits, bitorder="little").view(np.int32)
            self.rows["mask"][row] = place
            self.states[row].matcher = Masked(self.masks[place])

    def rules(self) -> SamplingRules:
        """Of their next step."""
        positions = np.array([state.position for state in self.states], np.uint64)
        self.rows["uniform"] = uniforms(self.seeds, positions)
        return replace(with_biases(self.rows, self.biases), masks=self.masks)

    def choose(self, logits):
        """By the host; the row's number, so that a failure says more."""
        return [(i, self.states[i].choose(row)) for i, row in enumerate(logits.float().numpy())]

    def sample(self, logits):
        """By the device, as the host says it, without its log-probabilities."""
        sampled = self.sampler.sample(logits, self.rules(), self.history)
        ends = zip(sampled.tokens.tolist(), sampled.peaks.tolist(), sampled.bests.tolist(), strict=True)
        return [token if math.isfinite(peak) and math.isfinite(best) else None for token, peak, best in ends]


def tokens(chosen):
    return [one.token_id if isinstance(one, SampledToken) else None for _, one in chosen]


def random_requests(seed, rows, vocab):
    """Any rules at all, and logits from nearly equal to far apart, a third of them with many ties."""
    random = np.random.default_rng(seed)

    def one():
        def pick(values):
            return values[random.integers(len(values))]

        rules = {"temperature": pick(TEMPERATURES), "top_k": pick(TOP_KS)}
        rules |= {"top_p": pick(TOP_PS), "min_p": pick(MIN_PS)}
        if random.random() < 0.4:
            rules |= {"repetition_penalty": pick(REPETITIONS), "frequency_penalty": pick(PENALTIES)}
            rules |= {"presence_penalty": pick(PENALTIES)}
        if random.random() < 0.3:
            ids = random.choice(vocab, 4, replace=False).tolist()
            rules["logit_bias"] = {i: pick(BIASES[:-1]) for i in ids}
        return SamplingParams(**rules)

    prompts = random.integers(0, vocab, (rows, 20)).tolist()
    bans = [random.integers(0, vocab, 3).tolist() if random.random() < 0.3 else [] for _ in range(rows)]
    densities = {row: random.choice([0.01, 0.5, 0.99]) for row in range(rows) if random.random() < 0.3}
    masks = {row: np.flatnonzero(random.random(vocab) < density) for row, density in densities.items()}
    requests = Requests(vocab, [one() for _ in range(rows)], prompts=prompts, bans=bans, masks=masks)
    logits = random.standard_normal((rows, vocab)) * random.choice([0.1, 1, 3, 10, 30], (rows, 1))
    logits = np.where(random.random((rows, 1)) < 0.3, np.round(logits), logits)
    logits[random.random(logits.shape) < 0.01] = -INF
    return requests, torch.from_numpy(logits.astype(np.float32))


def test_random_numbers_are_numpys():
    random = np.random.default_rng(0)
    keys, positions = (random.integers(0, 2**64, 3000, dtype=np.uint64) for _ in range(2))
    positions[:1000] = np.arange(1000)
    keys[-2:], positions[-3:] = 2**64 - 1, 2**64 - 1  # where the counter's next word is counted up

    found = uniforms(keys, positions)

    for key, position, number in zip(keys, positions, found, strict=True):
        raw = np.random.Philox(key=int(key), counter=int(position)).random_raw()
        assert float(int(raw) >> 11) * 2.0**-53 == number
    assert uniforms(keys[:0], positions[:0]).shape == (0,)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_the_twin_chooses_what_the_host_does():
    requests, logits = random_requests(0, 3000, 257)

    chosen = twin.sample(logits, requests.rules(), requests.history)

    expected = tokens(requests.choose(logits))
    assert [0 if token is None else token for token in expected] == [one.token for one in chosen]
    assert sum(token is not None for token in expected) > 2500


@pytest.mark.parametrize(("rows", "vocab", "split", "block"), [(150, 257, 256, 256), (12, 1000, 128, 64)])
def test_any_rules_choose_what_the_host_does(rows, vocab, split, block, monkeypatch):
    """Three steps' worth of rows, and their histories are as the twin leaves them."""
    monkeypatch.setattr(sampling_launch, "SPLIT", split)
    monkeypatch.setattr(sampling_launch, "BLOCK", block)
    requests, logits = random_requests(1, rows, vocab)
    history = requests.history.clone()
    twin.sample(logits, requests.rules(), history)

    found = requests.sample(logits)

    assert tokens(requests.choose(logits)) == found
    assert torch.equal(history, requests.history)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("vocab", [1, 257, 1024])
def test_greedy_rows_take_the_first_of_their_largest_logits(vocab, dtype, monkeypatch):
    """In one pass and a merge: nothing else is launched. Rows may be apart, as of a wider tensor."""
    for name in ("weigh_kernel", "gather_kernel", "tops_kernel", "report_kernel"):
        monkeypatch.setattr(kernels, name, None)
    wide = torch.randn(9, vocab + 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    logits = wide[:, :vocab]
    logits[1] = 3.0
    logits[2] = torch.where(torch.arange(vocab) % 2 == 0, -0.0, 0.0)
    logits[3, vocab // 2 :] = 7.0
    logits[4, :-1] = -INF
    requests = Requests(vocab, [SamplingParams(temperature=0)] * 9)

    found = requests.sample(logits)

    assert logits.float().numpy().argmax(-1).tolist() == found
    assert torch.equal(logits.float().amax(-1), requests.sampler.sampled.peaks)
    assert torch.equal(logits.float().amax(-1), requests.sampler.sampled.bests)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_logits_of_16_bits_are_widened_first(dtype):
    requests, logits = random_requests(2, 6, 257)

    assert tokens(requests.choose(logits.to(dtype))) == requests.sample(logits.to(dtype))


@pytest.mark.parametrize(
    "extreme",
    [
        {"top_k": 1},
        {"top_p": 1e-300},
        {"min_p": 1.0},
        {"temperature": 1e-38},
        {"temperature": 1e-45, "top_k": 3},
        {"temperature": 1e30},
        {"temperature": 1e30, "top_k": 100, "top_p": 0.5},
        {"top_k": 257, "top_p": 1 - 2**-53, "min_p": 1e-50},
        {"logit_bias": {0: 1e38, 128: 1e38, 256: -1e38}},
        {"repetition_penalty": 1e-30},
        {"repetition_penalty": 1e30, "presence_penalty": 1e38},
    ],
    ids=str,
)
def test_extremes_choose_what_the_host_does(extreme):
    params = SamplingParams(**{"temperature": 1.0} | extreme)
    requests = Requests(257, [params] * 4, prompts=[[0, 5, 130, 256]] * 4)
    logits = torch.randn(4, 257, generator=torch.Generator().manual_seed(3)) * 4
    logits[1] = logits[1].round()
    logits[2] = 1.5
    logits[3, ::2] = -INF

    assert tokens(requests.choose(logits)) == requests.sample(logits)


def test_tokens_are_drawn_as_often_as_they_are_likely():
    """Of one seed at 300 positions. The bound is exceeded by one seed in a million (chi-square, 7 degrees)."""
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 1.0, 0.5, -INF, 1.5, 0.2])
    rows = np.repeat(rule(temperature=1.3), 300)
    rows["uniform"] = uniforms(np.full(300, 7, np.uint64), np.arange(300, dtype=np.uint64))
    sampler = RowSampler(9, 300, CPU)

    found = sampler.sample(logits.expand(300, 9), SamplingRules(rows)).tokens.numpy()

    expected = 300 * torch.softmax(logits / 1.3, 0).numpy()
    counts = np.bincount(found, minlength=9)
    assert counts[6] == 0
    assert float((np.square(counts - expected)[expected > 0] / expected[expected > 0]).sum()) < 40.5


def test_a_row_without_a_token_says_so_and_no_neighbour_notices():
    params = [SamplingParams(temperature=temperature, top_p=0.9) for temperature in (0.0, 1.0)] * 6
    bans = [[]] * 10 + [list(range(257))] * 2
    requests = Requests(257, params, bans=bans)
    logits = torch.randn(12, 257, generator=torch.Generator().manual_seed(0))
    whole = requests.sample(logits)
    logits[2, 200] = logits[3, 200] = NAN
    logits[4, 0] = logits[5, 256] = INF
    logits[6], logits[7] = -INF, -INF

    found = requests.sample(logits)

    assert [*whole[:2], *[None] * 6, *whole[8:10], None, None] == found
    assert requests.sampler.sampled.tokens[[2, 3, 4, 5, 6, 7, 10, 11]].tolist() == [0] * 8
    assert requests.sampler.sampled.peaks[2:8].isnan().tolist() == [True] * 2 + [False] * 4
    assert requests.sampler.sampled.peaks[4:8].tolist() == [INF, INF, -INF, -INF]
    assert requests.sampler.sampled.bests[10:].tolist() == [-INF, -INF]
    assert tokens(requests.choose(logits)) == found


def test_histories_are_carried_from_step_to_step():
    """Rows that change places keep their slots; those without a penalty have none; a failed row adds nothing."""
    penalised = SamplingParams(temperature=0, repetition_penalty=1.5, frequency_penalty=0.5, presence_penalty=0.25)
    drawn = SamplingParams(temperature=1, top_k=20, frequency_penalty=-1.0)
    params = [penalised, drawn, SamplingParams(temperature=0)]
    requests = Requests(257, params, prompts=[[3, 200], [4], [5]], slots=[4, 1, 0])
    for step in range(5):
        logits = torch.randn(3, 257, generator=torch.Generator().manual_seed(step % 2))
        expected = tokens(requests.choose(logits))
        assert expected == requests.sample(logits)
        for state, token in zip(requests.states, expected, strict=True):
            state.observe(token)
    before = requests.history.clone()

    assert requests.sample(torch.full((3, 257), NAN)) == [None] * 3
    assert torch.equal(before, requests.history)
    assert requests.history.sum(1).tolist() == [0, 11, 0, 0, 12]


def test_a_row_is_sampled_alike_in_any_place_and_company():
    requests, logits = random_requests(4, 12, 257)
    rules, order = requests.rules(), np.random.default_rng(0).permutation(12)
    start = requests.history.clone()
    found = requests.sampler.sample(logits, rules, requests.history)
    tokens, bests = found.tokens.clone(), found.bests.clone()
    after, requests.history = requests.history, start.clone()
    other = replace(with_biases(rules.rows[order], [requests.biases[i] for i in order]), masks=rules.masks)

    moved = RowSampler(257, 20, CPU).sample(logits[order].clone(), other, requests.history)

    assert torch.equal(tokens[order], moved.tokens[:12])
    assert torch.equal(bests[order], moved.bests[:12])
    assert torch.equal(after, requests.history)
    first = replace(with_biases(other.rows[:1], [requests.biases[order[0]]]), masks=rules.masks)
    alone = RowSampler(257, 1, CPU).sample(logits[order[:1]], first, start)
    assert alone.tokens[0] == tokens[order[0]]


@pytest.mark.parametrize("num_top", [0, 5, 20])
def test_log_probabilities_are_those_of_the_raw_logits(num_top):
    """Equal ones by id, though penalties and biases choose the token."""
    params = SamplingParams(temperature=1, top_k=50, repetition_penalty=1.3, logit_bias={7: 4.0})
    requests = Requests(257, [params] * 4, prompts=[[1, 2]] * 4, num_top=num_top)
    logits = torch.randn(4, 257, generator=torch.Generator().manual_seed(0)) * 5
    logits[1] = logits[1].div(10).round()
    logits[2, 3:] = -INF
    logits[3] = torch.where(logits[3] > 0, 3e38, -3e38)
    expected = requests.choose(logits)

    assert tokens(expected) == requests.sample(logits)
    sampled = requests.sampler.sampled
    for row, one in expected:
        assert one.logprob.logprob == pytest.approx(sampled.logprobs[row].item(), rel=1e-6, abs=1e-6)
        assert [i for i, _ in one.logprob.top] == sampled.top_ids[row, :num_top].tolist()
        values = [value for _, value in one.logprob.top]
        assert values == pytest.approx(sampled.top_logprobs[row, :num_top].tolist(), rel=1e-6, abs=1e-6)


def test_only_rows_that_asked_are_reported():
    rows = np.concatenate([rule(num_top=-1), rule(num_top=3), rule(temperature=1, num_top=0)])
    sampler = RowSampler(2, 3, CPU)

    sampled = sampler.sample(torch.tensor([[0.0, 0.0]] * 3), SamplingRules(rows))

    assert sampled.logprobs.tolist() == pytest.approx([0, math.log(0.5), math.log(0.5)])
    assert sampled.top_ids[1, :3].tolist() == [0, 1, 0]  # there is no third
    assert sampled.top_logprobs[0].tolist() == sampled.top_logprobs[2].tolist() == [0.0] * 20


def test_many_biases_reach_their_tokens_in_any_split():
    """More than are looked at at once; a ban and a bias of one token are a ban."""
    biases = {i: 0.01 * (i % 7) for i in range(0, 1000, 2)}
    requests = Requests(1000, [SamplingParams(temperature=0, logit_bias=biases)] * 2, bans=[[], [996]])
    logits = torch.zeros(2, 1000)
    logits[:, 996] = 1

    assert tokens(requests.choose(logits)) == requests.sample(logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [257, 1000])
def test_a_mask_is_absolute_and_its_row_alone_is_masked(vocab, dtype):
    """Whatever bias a token has. Log-probabilities are of all tokens."""
    wanted = [0, 31, 32, 128, vocab - 1]
    params = SamplingParams(temperature=0, logit_bias={5: 100.0, 128: -3.0})
    requests = Requests(vocab, [params] * 3, masks={1: wanted}, num_top=2)
    logits = torch.randn(3, vocab, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = requests.choose(logits)

    found = requests.sample(logits)

    assert tokens(expected) == found
    assert (found[0], found[2]) == (5, 5)
    assert found[1] in wanted
    sampled = requests.sampler.sampled
    assert sampled.top_ids[1, :2].tolist() == [i for i, _ in expected[1][1].logprob.top]
    assert expected[1][1].logprob.logprob == pytest.approx(sampled.logprobs[1].item(), rel=1e-6, abs=1e-6)


def test_a_row_whose_mask_leaves_nothing_has_no_token_and_no_neighbour_notices():
    requests = Requests(257, [SamplingParams(temperature=1)] * 3, masks={1: []})
    logits = torch.randn(3, 257, generator=torch.Generator().manual_seed(0))

    found = requests.sample(logits)

    assert found[1] is None
    assert requests.sampler.sampled.bests[1] == -INF
    assert tokens(requests.choose(logits)) == found


def test_a_step_without_rows_and_a_vocabulary_that_is_too_large():
    RowSampler(257, 4, CPU).sample(torch.empty(0, 257), SamplingRules(np.empty(0, RULE)))

    with pytest.raises(ValueError, match="a vocabulary of 262145 tokens is too large for sampling, which takes 262144"):
        RowSampler(262_145, 4, CPU)


def test_memory_that_is_reserved_does_not_grow():
    requests, logits = random_requests(5, 3, 257)
    requests.sampler.reserve()
    before = requests.sampler._scores.data_ptr(), requests.sampler._candidates.data_ptr()

    requests.sample(logits)

    assert before == (requests.sampler._scores.data_ptr(), requests.sampler._candidates.data_ptr())
