"""Kernels that choose the next token of each row of logits. A row is worked on alone; nothing here knows a request.

A row is cut into splits of `SPLIT` tokens, whatever its batch, so that few rows keep a GPU busy too. Programs of one
kernel leave what they found of their split for those of the next, which all add it up in the same order:

    scan     all rows: the largest logit, adjusted scores, the largest of them
    weigh    sampled rows: the mass of their weights exp((score - largest) / temperature), and their octaves
    gather   filtered rows: the few weights among which their survivors are
    choose   all rows: the token
    tops     rows that report: the likeliest tokens of each split, by their logits
    report   rows that report: log-probabilities

A weight is in 0..1, where floats order as their bits do.
"""

# Triton reads annotations as code and knows only its own.
# ruff: noqa: ANN001, ANN201, ANN202, PLR0917, SIM102
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from gralora_kernels.sampling_rules import COLUMNS, WORDS
from gralora_kernels.triton_ops.early import wait_for_others

RULE = tl.constexpr(WORDS)
UNIFORM = tl.constexpr(COLUMNS["uniform"])
TEMPERATURE = tl.constexpr(COLUMNS["temperature"])
TOP_P = tl.constexpr(COLUMNS["top_p"])
MIN_P = tl.constexpr(COLUMNS["min_p"])
REPETITION = tl.constexpr(COLUMNS["repetition_penalty"])
FREQUENCY = tl.constexpr(COLUMNS["frequency_penalty"])
PRESENCE = tl.constexpr(COLUMNS["presence_penalty"])
TOP_K = tl.constexpr(COLUMNS["top_k"])
SLOT = tl.constexpr(COLUMNS["history_slot"])
NUM_TOP = tl.constexpr(COLUMNS["num_top"])
FIRST_BIAS = tl.constexpr(COLUMNS["first_bias"])
NUM_BIASES = tl.constexpr(COLUMNS["num_biases"])
MASK = tl.constexpr(COLUMNS["mask"])

SPLITS = tl.constexpr(64)  # most of a row
OCTAVES = tl.constexpr(32)  # 0: a weight of 1, i: from 2^-i up to twice that, the last: all that is below
TOPS = tl.constexpr(32)  # places for the likeliest tokens of a split, a power of two
BIASES = tl.constexpr(256)  # ids that are looked at at once
ONE = tl.constexpr(0x3F800000)  # the bits of 1.0
NO_KEY = tl.constexpr(-0x80000000)  # below that of any float


@triton.jit
def _columns(split, SPLIT: tl.constexpr, ALIGN: tl.constexpr):
    return split * SPLIT + tl.max_contiguous(tl.multiple_of(tl.arange(0, SPLIT), ALIGN), ALIGN)


@triton.jit
def _peak(x):
    """The largest, NaN if any is."""
    is_nan = x != x  # noqa: PLR0124
    largest = tl.max(tl.where(is_nan, float("-inf"), x), 0)
    return tl.where(tl.max(is_nan.to(tl.int32), 0) > 0, float("nan"), largest)


@triton.jit
def _is_finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def _merged(parts, row, vocab, SPLIT: tl.constexpr):
    """The largest of a row's splits, NaN if any is."""
    s = tl.arange(0, SPLITS)
    return _peak(tl.load(parts + row * SPLITS + s, mask=s * SPLIT < vocab, other=float("-inf")))


@triton.jit
def _best(part_peaks, part_bests, row, vocab, SPLIT: tl.constexpr):
    """A row's largest score; not finite where the row gets no token."""
    peak = _merged(part_peaks, row, vocab, SPLIT)
    return tl.where(_is_finite(peak), _merged(part_bests, row, vocab, SPLIT), peak)


@triton.jit
def _biased(x, c, bias_ids, biases, first, count, begin, end):
    """x with the biases of those ids that are in begin..end. Ids ascend."""
    below = 0
    before_end = 0
    for i in range(0, count, BIASES):
        b = i + tl.arange(0, BIASES)
        b_ids = tl.load(bias_ids + first + b, mask=b < count, other=0x7FFFFFFF)
        below += tl.sum((b_ids < begin).to(tl.int32), 0)
        before_end += tl.sum((b_ids < end).to(tl.int32), 0)
    for i in range(below, before_end):
        bias = tl.load(biases + first + i).to(tl.float32)
        x = tl.where(c == tl.load(bias_ids + first + i), x + bias, x)
    return x


@triton.jit
def _is_adjusted(integers, row):
    """Whether a row's scores are not simply its logits."""
    is_adjusted = tl.load(integers + row * RULE + SLOT) >= 0
    is_adjusted |= tl.load(integers + row * RULE + NUM_BIASES) > 0
    return is_adjusted | (tl.load(integers + row * RULE + MASK) >= 0)


@triton.jit(do_not_specialize=["vocab_units", "stride_units", "mask_words"])
def scan_kernel(
    part_peaks,  # [rows, SPLITS]: the largest logit, NaN if any is
    part_bests,  # [rows, SPLITS]: the largest score, NaN if any is
    part_ids,  # int32 [rows, SPLITS]: the first token that has it
    scores,  # fp32 [rows, vocab], written where they are not simply the logits
    logits,  # [rows, vocab], rows being `stride` apart
    numbers,  # fp64 and int64, one memory: [rows] of RULE
    integers,
    bias_ids,  # int64 [biases]
    biases,  # fp64 [biases]
    history,  # int32 [slots, vocab]: twice how often a token was written, and one if the prompt has it
    masks,  # int32 [masked rows, mask_words]: a bit for each token, set if it may be chosen
    mask_words,
    vocab_units,  # vocab / ALIGN: a size that is multiplied by ALIGN is known to be a multiple of it
    stride_units,
    SPLIT: tl.constexpr,
    ALIGN: tl.constexpr,
    ADJUSTS: tl.constexpr,
):
    """One program: one split of one row."""
    wait_for_others()
    vocab, stride = vocab_units * ALIGN, stride_units * ALIGN
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    c = _columns(split, SPLIT, ALIGN)
    mask = c < vocab
    b_logits = tl.load(logits + row * stride + c, mask=mask, other=float("-inf"))
    x = b_logits.to(tl.float32)
    peak = _peak(x)
    if ADJUSTS:
        slot, num_biases = tl.load(integers + row * RULE + SLOT), tl.load(integers + row * RULE + NUM_BIASES)
        if num_biases > 0:
            first = tl.load(integers + row * RULE + FIRST_BIAS)
            x = _biased(x, c, bias_ids, biases, first, num_biases.to(tl.int32), split * SPLIT, (split + 1) * SPLIT)
        if slot >= 0:
            b_history = tl.load(history + slot * vocab + c, mask=mask, other=0)
            repetition = tl.load(numbers + row * RULE + REPETITION).to(tl.float32)
            frequency = tl.load(numbers + row * RULE + FREQUENCY).to(tl.float32)
            presence = tl.load(numbers + row * RULE + PRESENCE).to(tl.float32)
            x = tl.where(b_history != 0, tl.where(x < 0, x * repetition, tl.div_rn(x, repetition)), x)
            b_written = b_history >> 1
            x = tl.where(b_written > 0, (x - b_written.to(tl.float32) * frequency) - presence, x)
        mask_row = tl.load(integers + row * RULE + MASK)
        if mask_row >= 0:
            b_masks = tl.load(masks + mask_row * mask_words + (c >> 5), mask=mask, other=0)
            x = tl.where(((b_masks >> (c & 31)) & 1) != 0, x, float("-inf"))
        if _is_adjusted(integers, row):
            tl.store(scores + row * vocab + c, x, mask=mask)
    best = _peak(x)
    tl.store(part_peaks + row * SPLITS + split, peak)
    tl.store(part_bests + row * SPLITS + split, best)
    tl.store(part_ids + row * SPLITS + split, tl.min(tl.where(x == best, c, vocab), 0))


@triton.jit
def _weights(logits, scores, numbers, integers, row, c, vocab, stride, best):
    """fp32, in 0..1, of tokens `c`; 0 behind the vocabulary."""
    mask = c < vocab
    if _is_adjusted(integers, row):
        b_scores = tl.load(scores + row * vocab + c, mask=mask, other=float("-inf"))
    else:
        b_logits = tl.load(logits + row * stride + c, mask=mask, other=float("-inf"))
        b_scores = b_logits.to(tl.float32)
    temperature = tl.load(numbers + row * RULE + TEMPERATURE).to(tl.float32)
    weights = tl.exp(tl.div_rn(b_scores - best, temperature))
    return tl.minimum(weights, 1.0)  # a GPU's exponential is an approximation


@triton.jit
def _octaves(weights):
    return tl.minimum(127 - (weights.to(tl.int32, bitcast=True) >> 23), OCTAVES - 1)


@triton.jit
def _is_filtered(numbers, integers, row):
    is_filtered = tl.load(integers + row * RULE + TOP_K) > 0
    is_filtered |= tl.load(numbers + row * RULE + TOP_P) < 1
    return is_filtered | (tl.load(numbers + row * RULE + MIN_P) > 0)


@triton.jit(do_not_specialize=["vocab_units", "stride_units"])
def weigh_kernel(
    masses,  # fp64 [rows, SPLITS]: sums of weights
    octaves,  # int32 [rows, SPLITS, OCTAVES]: how many weights are in each
    logits,
    scores,
    numbers,
    integers,
    part_peaks,
    part_bests,
    vocab_units,
    stride_units,
    SPLIT: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """One program: one split of one row."""
    wait_for_others()
    vocab, stride = vocab_units * ALIGN, stride_units * ALIGN
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if tl.load(numbers + row * RULE + TEMPERATURE) == 0:
        return
    best = _best(part_peaks, part_bests, row, vocab, SPLIT)
    if not _is_finite(best):
        return
    weights = _weights(logits, scores, numbers, integers, row, _columns(split, SPLIT, ALIGN), vocab, stride, best)
    tl.store(masses + row * SPLITS + split, tl.sum(weights.to(tl.float64), 0))
    if _is_filtered(numbers, integers, row):
        p_octaves = octaves + (row * SPLITS + split) * OCTAVES + tl.arange(0, OCTAVES)
        tl.store(p_octaves, tl.histogram(_octaves(weights), OCTAVES))


@triton.jit
def _total(masses, row, vocab, SPLIT: tl.constexpr):
    s = tl.arange(0, SPLITS)
    return tl.sum(tl.load(masses + row * SPLITS + s, mask=s * SPLIT < vocab, other=0.0), 0)


@triton.jit
def _candidates(masses, octaves, numbers, integers, row, vocab, SPLIT: tl.constexpr):
    """The last octave that may have survivors, and how many weights each split has down to it [SPLITS].

    The first filter decides: down to where top-k has its tokens, or else to where all lighter weights together are
    less than what top-p leaves out, even if each were the largest of its octave. Min-p alone has its own octave.
    """
    s, o = tl.arange(0, SPLITS), tl.arange(0, OCTAVES)
    p_octaves = octaves + (row * SPLITS + s[:, None]) * OCTAVES + o[None, :]
    b_octaves = tl.load(p_octaves, mask=(s * SPLIT < vocab)[:, None], other=0)
    counts = tl.sum(b_octaves, 0)
    top_k, top_p = tl.load(integers + row * RULE + TOP_K), tl.load(numbers + row * RULE + TOP_P)
    if (top_k > 0) & (top_k < vocab):
        is_enough = tl.cumsum(counts, 0) >= top_k
    elif top_p < 1:
        most = tl.exp2(tl.where(o > 0, 1 - o, 0).to(tl.float32)) * counts.to(tl.float32)
        lighter = tl.sum(tl.where(o[None, :] > o[:, None], most[None, :], 0.0), 1)
        left_out = (1 - top_p) * _total(masses, row, vocab, SPLIT)
        is_enough = lighter.to(tl.float64) * 1.0001 <= left_out - 1e-9
    else:
        is_enough = o >= _octaves(tl.load(numbers + row * RULE + MIN_P).to(tl.float32))
    last = tl.min(tl.where(is_enough, o, OCTAVES - 1), 0)
    return last, tl.sum(tl.where(o[None, :] <= last, b_octaves, 0), 1)


@triton.jit(do_not_specialize=["vocab_units", "stride_units"])
def gather_kernel(
    candidates,  # int32 [rows, vocab]: bits of weights, in the order of their tokens
    logits,
    scores,
    numbers,
    integers,
    part_peaks,
    part_bests,
    masses,
    octaves,
    vocab_units,
    stride_units,
    SPLIT: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """One program: one split of one row."""
    wait_for_others()
    vocab, stride = vocab_units * ALIGN, stride_units * ALIGN
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if (tl.load(numbers + row * RULE + TEMPERATURE) == 0) | (not _is_filtered(numbers, integers, row)):
        return
    best = _best(part_peaks, part_bests, row, vocab, SPLIT)
    if not _is_finite(best):
        return
    last, counts = _candidates(masses, octaves, numbers, integers, row, vocab, SPLIT)
    start = tl.sum(tl.where(tl.arange(0, SPLITS) < split, counts, 0), 0)
    c = _columns(split, SPLIT, ALIGN)
    weights = _weights(logits, scores, numbers, integers, row, c, vocab, stride, best)
    is_candidate = (_octaves(weights) <= last) & (c < vocab)
    place = start + tl.cumsum(is_candidate.to(tl.int32), 0) - 1
    tl.store(candidates + row * vocab + place, weights.to(tl.int32, bitcast=True), mask=is_candidate)


@triton.jit
def _value(bits):
    return bits.to(tl.float32, bitcast=True).to(tl.float64)


@triton.jit
def _threshold(p_candidates, num_candidates, target, floor, BY_MASS: tl.constexpr, BLOCK: tl.constexpr):
    """The most bits t for which the candidates of at least t reach the target, by count or by mass; all those of at
    least `floor` do. Found from the highest of its octal digits down."""
    d = tl.arange(0, 8)
    threshold = floor * 0
    for digit in range(10):
        shift = 27 - 3 * digit
        edges = threshold + (d << shift)
        reached = tl.zeros([8], tl.float64 if BY_MASS else tl.int32)
        for first in range(0, num_candidates, BLOCK):
            i = first + tl.arange(0, BLOCK)
            b_bits = tl.load(p_candidates + i, mask=i < num_candidates, other=0)
            is_above = b_bits[:, None] >= edges[None, :]
            if BY_MASS:
                reached += tl.sum(tl.where(is_above, _value(b_bits)[:, None], 0.0), 0)
            else:
                reached += tl.sum(is_above.to(tl.int32), 0)
        is_enough = (reached >= target) | (edges <= floor)
        threshold += tl.max(tl.where(is_enough, d, 0), 0) << shift
    return threshold


@triton.jit
def _above(p_candidates, num_candidates, threshold, BLOCK: tl.constexpr):
    """How many candidates have more bits, and their mass."""
    count, mass = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.float64)
    for first in range(0, num_candidates, BLOCK):
        i = first + tl.arange(0, BLOCK)
        b_bits = tl.load(p_candidates + i, mask=i < num_candidates, other=0)
        is_above = b_bits > threshold
        count += is_above.to(tl.int32)
        mass += tl.where(is_above, _value(b_bits), 0.0)
    return tl.sum(count, 0), tl.sum(mass, 0)


@triton.jit
def _survivors(p_candidates, num_candidates, total, numbers, integers, row, vocab, BLOCK: tl.constexpr):
    """Bits above which a weight survives, and how many of those that are equal to them do, the lowest ids first."""
    threshold, num_equal = num_candidates * 0, num_candidates
    top_k, top_p = tl.load(integers + row * RULE + TOP_K), tl.load(numbers + row * RULE + TOP_P)
    if (top_k > 0) & (top_k < vocab):
        threshold = _threshold(p_candidates, num_candidates, top_k, threshold, False, BLOCK)
        count, mass = _above(p_candidates, num_candidates, threshold, BLOCK)
        num_equal = top_k.to(tl.int32) - count
        total = mass + num_equal * _value(threshold)
    if top_p < 1:
        target = top_p * total
        nucleus = tl.minimum(_threshold(p_candidates, num_candidates, target, threshold, True, BLOCK), ONE)
        _, mass = _above(p_candidates, num_candidates, nucleus, BLOCK)
        value = _value(tl.maximum(nucleus, 1))
        needed = tl.ceil((target - mass) / value)
        needed -= tl.where(mass + (needed - 1) * value >= target, 1.0, 0.0)  # the quotient was rounded
        needed += tl.where(mass + needed * value < target, 1.0, 0.0)
        needed = tl.minimum(tl.maximum(needed, 1.0), vocab.to(tl.float64)).to(tl.int32)
        num_equal = tl.where(nucleus == threshold, tl.minimum(needed, num_equal), needed)
        threshold = nucleus
    least = tl.load(numbers + row * RULE + MIN_P).to(tl.float32).to(tl.int32, bitcast=True)
    num_equal = tl.where(least > threshold, 0, num_equal)
    return tl.maximum(threshold, least - 1), num_equal


@triton.jit
def _surviving(p_candidates, i, num_candidates, threshold, num_equal):
    """Weights of candidates `i`, 0 if they do not survive, and how many more of the equal ones may."""
    b_bits = tl.load(p_candidates + i, mask=i < num_candidates, other=0)
    is_equal = (b_bits == threshold) & (i < num_candidates)
    is_in = (b_bits > threshold) | (is_equal & (tl.cumsum(is_equal.to(tl.int32), 0) <= num_equal))
    return tl.where(is_in, _value(b_bits), 0.0), num_equal - tl.sum(is_equal.to(tl.int32), 0)


@triton.jit
def _first_past(measures, indices, goal):
    """Index of the first that the sum up to it takes past the goal; else, sums being rounded, of the last there is."""
    is_past = (tl.cumsum(measures, 0) > goal) & (measures > 0)
    last = tl.max(tl.where(measures > 0, indices, 0), 0)
    return tl.min(tl.where(is_past, indices, last), 0)


@triton.jit
def _drawn_candidate(p_candidates, num_candidates, threshold, num_equal, uniform, BLOCK: tl.constexpr):
    """The first place at which the summed weights of survivors exceed their share `uniform`."""
    total, left = uniform * 0, num_equal
    for first in range(0, num_candidates, BLOCK):
        weights, left = _surviving(p_candidates, first + tl.arange(0, BLOCK), num_candidates, threshold, left)
        total += tl.sum(weights, 0)
    goal, reached, left = uniform * total, uniform * 0, num_equal
    drawn, last = num_candidates, num_candidates * 0
    for first in range(0, num_candidates, BLOCK):
        i = first + tl.arange(0, BLOCK)
        weights, left = _surviving(p_candidates, i, num_candidates, threshold, left)
        is_past = (reached + tl.cumsum(weights, 0) > goal) & (weights > 0)
        drawn = tl.minimum(drawn, tl.min(tl.where(is_past, i, num_candidates), 0))
        last = tl.maximum(last, tl.max(tl.where(weights > 0, i, 0), 0))
        reached += tl.sum(weights, 0)
    return tl.where(drawn < num_candidates, drawn, last)  # sums in another order may fall short by rounding


@triton.jit
def _drawn(
    logits, scores, numbers, integers, masses, octaves, candidates, row, vocab, stride, best,
    SPLIT: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """A token by inverse CDF over the survivors in the order of their ids: first its split, then its place in it."""
    s = tl.arange(0, SPLITS)
    uniform = tl.load(numbers + row * RULE + UNIFORM)
    is_filtered = _is_filtered(numbers, integers, row)
    if is_filtered:
        octave, counts = _candidates(masses, octaves, numbers, integers, row, vocab, SPLIT)
        num_candidates = tl.minimum(tl.sum(counts, 0), vocab)  # behind the vocabulary weights are 0, in the last octave
        p_candidates = candidates + row * vocab
        total = _total(masses, row, vocab, SPLIT)
        threshold, num_equal = _survivors(
            p_candidates, num_candidates, total, numbers, integers, row, vocab, BLOCK
        )  # fmt: skip
        place = _drawn_candidate(p_candidates, num_candidates, threshold, num_equal, uniform, BLOCK)
        goal, measures = place.to(tl.float64), counts.to(tl.float64)
    else:
        octave = OCTAVES - 1 + vocab * 0
        measures = tl.load(masses + row * SPLITS + s, mask=s * SPLIT < vocab, other=0.0)
        goal = uniform * tl.sum(measures, 0)
    split = _first_past(measures, s, goal)
    goal -= tl.sum(tl.where(s < split, measures, 0.0), 0)
    c = _columns(split, SPLIT, ALIGN)
    weights = _weights(logits, scores, numbers, integers, row, c, vocab, stride, best)
    is_candidate = (_octaves(weights) <= octave) & (c < vocab)
    measures = tl.where(is_filtered, is_candidate.to(tl.float64), weights.to(tl.float64))
    return _first_past(measures, c, goal)


@triton.jit(do_not_specialize=["vocab_units", "stride_units"])
def choose_kernel(
    tokens,  # int32 [rows]
    peaks,  # fp32 [rows]: the largest logit
    bests,  # fp32 [rows]: the largest score
    history,
    logits,
    scores,
    numbers,
    integers,
    part_peaks,
    part_bests,
    part_ids,
    masses,
    octaves,
    candidates,
    vocab_units,
    stride_units,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
    SAMPLES: tl.constexpr,
):
    """One program: one row. One whose largest logit or score is not finite gets token 0, which nobody may use."""
    wait_for_others()
    vocab, stride = vocab_units * ALIGN, stride_units * ALIGN
    row, s = tl.program_id(0).to(tl.int64), tl.arange(0, SPLITS)
    peak, best = _merged(part_peaks, row, vocab, SPLIT), _merged(part_bests, row, vocab, SPLIT)
    is_split = s * SPLIT < vocab
    b_bests = tl.load(part_bests + row * SPLITS + s, mask=is_split, other=float("-inf"))
    b_ids = tl.load(part_ids + row * SPLITS + s, mask=is_split, other=0)
    is_chosen = _is_finite(peak) & _is_finite(best)
    token = tl.where(is_chosen, tl.min(tl.where(b_bests == best, b_ids, vocab), 0), 0)
    if SAMPLES:
        if is_chosen & (tl.load(numbers + row * RULE + TEMPERATURE) > 0):
            token = _drawn(
                logits, scores, numbers, integers, masses, octaves, candidates, row, vocab, stride, best,
                SPLIT, BLOCK, ALIGN,
            )  # fmt: skip
    tl.store(tokens + row, token)
    tl.store(peaks + row, peak)
    tl.store(bests + row, best)
    slot = tl.load(integers + row * RULE + SLOT)
    if (slot >= 0) & is_chosen:
        p_history = history + slot * vocab + token
        tl.store(p_history, tl.load(p_history) + 2)


@triton.jit
def _key(x):
    """Orders as x does, equals being equal, and is its own inverse in bits."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit(do_not_specialize=["vocab_units", "stride_units"])
def tops_kernel(
    top_keys,  # int32 [rows, SPLITS, TOPS]: of a split's largest logits, in order
    part_top_ids,  # int32 [rows, SPLITS, TOPS]
    sums,  # fp64 [rows, SPLITS]: of exp(logit - peak)
    logits,
    integers,
    part_peaks,
    vocab_units,
    stride_units,
    SPLIT: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """One program: one split of one row."""
    wait_for_others()
    vocab, stride = vocab_units * ALIGN, stride_units * ALIGN
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    num_top = tl.load(integers + row * RULE + NUM_TOP).to(tl.int32)
    if num_top < 0:
        return
    peak = _merged(part_peaks, row, vocab, SPLIT)
    if not _is_finite(peak):
        return
    c = _columns(split, SPLIT, ALIGN)
    mask = c < vocab
    b_logits = tl.load(logits + row * stride + c, mask=mask, other=float("-inf"))
    x = b_logits.to(tl.float32)
    tl.store(sums + row * SPLITS + split, tl.sum(tl.exp(x - peak).to(tl.float64), 0))
    keys = tl.where(mask, _key(x), NO_KEY)
    p = (row * SPLITS + split) * TOPS
    for i in range(tl.minimum(num_top, vocab)):
        key = tl.max(keys, 0)
        token = tl.min(tl.where(keys == key, c, vocab), 0)
        tl.store(top_keys + p + i, key)
        tl.store(part_top_ids + p + i, token)
        keys = tl.where(c == token, NO_KEY, keys)


@triton.jit
def _below(logit, peak):
    """Their difference in float32, and in float64 where that overflows."""
    difference = logit - peak
    wide = logit.to(tl.float64) - peak.to(tl.float64)
    return tl.where(_is_finite(difference), difference.to(tl.float64), wide)


@triton.jit(do_not_specialize=["vocab_units", "stride_units"])
def report_kernel(
    logprobs,  # fp32 [rows]
    top_ids,  # int32 [rows, most]
    top_logprobs,  # fp32 [rows, most]
    tokens,
    logits,
    integers,
    part_peaks,
    part_bests,
    top_keys,
    part_top_ids,
    sums,
    vocab_units,
    stride_units,
    SPLIT: tl.constexpr,
    ALIGN: tl.constexpr,
    MOST: tl.constexpr,
):
    """One program: one row."""
    wait_for_others()
    vocab, stride = vocab_units * ALIGN, stride_units * ALIGN
    row, s, t = tl.program_id(0).to(tl.int64), tl.arange(0, SPLITS), tl.arange(0, TOPS)
    num_top = tl.load(integers + row * RULE + NUM_TOP).to(tl.int32)
    peak = _merged(part_peaks, row, vocab, SPLIT)
    if (num_top < 0) | (not _is_finite(_best(part_peaks, part_bests, row, vocab, SPLIT))):
        return
    b_sums = tl.load(sums + row * SPLITS + s, mask=s * SPLIT < vocab, other=0.0)
    log_total = tl.log(tl.sum(b_sums, 0))
    logit = tl.load(logits + row * stride + tl.load(tokens + row)).to(tl.float32)
    tl.store(logprobs + row, (_below(logit, peak) - log_total).to(tl.float32))
    p = (row * SPLITS + s[:, None]) * TOPS + t[None, :]
    mask = (s * SPLIT < vocab)[:, None] & (t < num_top)[None, :]
    keys = tl.load(top_keys + p, mask=mask, other=NO_KEY)
    b_ids = tl.load(part_top_ids + p, mask=mask, other=0)
    for i in range(tl.minimum(num_top, vocab)):
        key = tl.max(tl.max(keys, 1), 0)
        token = tl.min(tl.min(tl.where(keys == key, b_ids, vocab), 1), 0)
        value = (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        tl.store(top_ids + row * MOST + i, token)
        tl.store(top_logprobs + row * MOST + i, (_below(value, peak) - log_total).to(tl.float32))
        keys = tl.where(b_ids == token, NO_KEY, keys)
