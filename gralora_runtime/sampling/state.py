"""One request's rules for its next token, and how they are followed on the host: in float32, a row alone. No torch.

A row takes one random number that is a function of its seed and position. So a request's tokens depend neither on its
neighbours nor on whether it was preempted on the way.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from gralora_kernels.sampling_rules import SMALLEST_TEMPERATURE, float32
from gralora_runtime.errors import InvalidRequestError
from gralora_runtime.request import ResponseParams, SamplingParams, StoppingParams, TokenLogprob
from gralora_runtime.sampling.outcome import MatchingFailure, SampledToken, SamplingFailure
from gralora_runtime.structured.matcher import Matcher
from gralora_runtime.structured.vocabulary import as_bools

FloatRow = npt.NDArray[np.float32]
IdRow = npt.NDArray[np.int64]


class SamplerState:
    """What one request carries from token to token: its rules, its token counts, its place in the random stream."""

    def __init__(
        self,
        params: SamplingParams,
        stopping: StoppingParams,
        response: ResponseParams,
        *,
        seed: int,
        prompt_token_ids: Sequence[int],
        eos_token_ids: Collection[int],
        vocab_size: int,
        matcher: Matcher | None = None,
    ) -> None:
        """`matcher`: of what the answer has to match. Its mask is filled before each choice."""
        self.vocab_size = vocab_size
        self.params = params
        self.random_key = seed % 2**64
        self.position = 0  # output tokens so far
        self._min_tokens = stopping.min_tokens
        ending = {*eos_token_ids, *stopping.stop_token_ids}
        self._ending_ids = np.array(sorted(i for i in ending if 0 <= i < vocab_size), dtype=np.int64)
        self._bias_ids, self._bias = _bias_rows(params.logit_bias, vocab_size)
        self.history = TokenHistory(prompt_token_ids, vocab_size) if _has_penalties(params) else None
        self.num_top = response.top_logprobs if response.logprobs else None  # None: no logprobs at all
        self.matcher = matcher

    def observe(self, token_id: int) -> None:
        """Records an output token that is now part of the request, also while replaying after a preemption."""
        self.position += 1
        if self.history is not None:
            self.history.add(token_id)
        if self.matcher is not None:
            self.matcher.advance(token_id)

    @property
    def is_complete(self) -> bool:
        """Nothing may follow on what the answer is so far."""
        return self.matcher is not None and self.matcher.is_complete

    @property
    def takes_argmax(self) -> bool:
        """Whether the next token is simply the largest logit, with nothing to add to or to report about the row."""
        adjusted = self._bias_ids.size > 0 or self.history is not None or self._bans_ending(self.position)
        adjusted = adjusted or self.matcher is not None
        return self.params.temperature == 0 and not adjusted and self.num_top is None

    def choose(self, logits: FloatRow) -> SampledToken | SamplingFailure | MatchingFailure:
        """The next token, from this request's row of raw logits, which is left as it was.

        In this order, as in transformers and vLLM: log-probabilities are taken from the raw logits; ids that would end
        the request are banned below `min_tokens`; logit bias; repetition, frequency and presence penalty; all but what
        may come next in what the answer has to match is banned; temperature (0: the largest score); top-k; top-p of
        what top-k left; min-p of what both left. Each filter keeps at least the likeliest token. Wherever scores are
        equal, the lowest token id goes first.
        """
        with np.errstate(all="ignore"):  # what overflows shows up as a score that is not finite
            if not math.isfinite(peak := logits.max()):
                return self.failure(float(peak), float(peak))
            scores = self._adjusted(logits)
            token_id = int(scores.argmax())
            if not math.isfinite(scores[token_id]):
                return self.failure(float(peak), float(scores[token_id]))
            if self.params.temperature > 0:
                token_id = self._draw(scores - scores[token_id])
            return SampledToken(token_id, self._report(logits, token_id))

    def failure(self, peak: float, best: float) -> SamplingFailure | MatchingFailure:
        """Why there is no token, where the largest logit or the largest score is not finite."""
        if not math.isfinite(peak):
            return SamplingFailure(f"the model's largest logit is {peak}")
        if self.matcher is not None:
            return MatchingFailure(self.matcher.refusal())
        return SamplingFailure(f"no token is left to choose from: the largest score is {best}")

    def biases_at(self, position: int) -> tuple[IdRow, FloatRow]:
        """Token ids, ascending, and what is added to their logits when so many tokens are written; -inf bans one."""
        if not self._bans_ending(position):
            return self._bias_ids, self._bias
        ids = np.concatenate([self._bias_ids, self._ending_ids])
        biases = np.concatenate([self._bias, np.full(self._ending_ids.size, -np.inf, np.float32)])
        order = ids.argsort(kind="stable")
        return ids[order], biases[order]

    @property
    def first_unbanned(self) -> int:
        """From this position on nothing is banned any more."""
        return self._min_tokens if self._ending_ids.size else 0

    @property
    def has_biases(self) -> bool:
        return self._bias_ids.size > 0

    def _bans_ending(self, position: int) -> bool:
        if position >= self._min_tokens or not self._ending_ids.size:
            return False
        return self.matcher is None or not self.matcher.must_end

    def _adjusted(self, logits: FloatRow) -> FloatRow:
        scores = np.array(logits, dtype=np.float32)  # [vocab], a copy
        if self._bans_ending(self.position):
            scores[self._ending_ids] = -np.inf
        scores[self._bias_ids] += self._bias
        if self.history is not None:
            self.history.penalise(scores, self.params)
        if self.matcher is not None:
            assert self.matcher.mask is not None, "a token is chosen before its mask is filled"
            scores[~as_bools(self.matcher.mask, self.vocab_size)] = -np.inf
        return scores

    def _draw(self, below_peak: FloatRow) -> int:
        """By inverse CDF over the surviving tokens in the order of their ids; `below_peak` is at most 0."""
        weights = np.exp(below_peak / float32(max(self.params.temperature, SMALLEST_TEMPERATURE)))
        token_ids, weights = _survivors(weights, self.params)
        cumulative = weights.cumsum(dtype=np.float64)  # [survivors]
        # The number is below 1, so the product is below the last entry, and a token of weight 0 is never hit.
        return int(token_ids[cumulative.searchsorted(self._uniform() * cumulative[-1], side="right")])

    def _uniform(self) -> float:
        """In [0, 1): a function of the seed and the output position only, so it survives a preemption."""
        raw = np.random.Philox(key=self.random_key, counter=self.position).random_raw()
        return float(int(raw) >> 11) * 2.0**-53

    def _report(self, logits: FloatRow, token_id: int) -> TokenLogprob | None:
        if self.num_top is None:
            return None
        peak = logits.max()
        log_total = math.log(np.exp(logits - peak).sum(dtype=np.float64))
        top = tuple((int(i), _below(logits[i], peak) - log_total) for i in _largest(logits, self.num_top))
        return TokenLogprob(token_id, _below(logits[token_id], peak) - log_total, top)


class TokenHistory:
    """Which tokens a request has seen and how often it wrote each; kept only for requests with a penalty."""

    def __init__(self, prompt_token_ids: Sequence[int], vocab_size: int) -> None:
        self._in_prompt = np.zeros(vocab_size, dtype=np.bool_)
        self._in_prompt[list(prompt_token_ids)] = True
        self._seen = self._in_prompt.copy()  # prompt and output
        self._counts = np.zeros(vocab_size, dtype=np.float32)  # output only

    def as_words(self) -> npt.NDArray[np.int32]:
        """[vocab]: twice how often a token was written, and one if it is in the prompt."""
        written = self._counts.astype(np.int32)
        return 2 * written + self._in_prompt

    def add(self, token_id: int) -> None:
        self._seen[token_id] = True
        self._counts[token_id] += 1

    def penalise(self, scores: FloatRow, params: SamplingParams) -> None:
        """In place: first repetition (pushes a score down whatever its sign), then frequency and presence."""
        if params.repetition_penalty != 1:
            seen = np.flatnonzero(self._seen)
            before = scores[seen]
            factor = float32(params.repetition_penalty)
            scores[seen] = np.where(before < 0, before * factor, before / factor)
        if params.frequency_penalty or params.presence_penalty:
            written = np.flatnonzero(self._counts)
            scores[written] -= self._counts[written] * float32(params.frequency_penalty)
            scores[written] -= float32(params.presence_penalty)


def _has_penalties(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1 or bool(params.presence_penalty or params.frequency_penalty)


def _below(logit: np.float32, peak: np.float32) -> float:
    """Their difference in float32, and in float64 where that overflows: a token that was chosen has a probability."""
    difference = float(logit - peak)
    return difference if math.isfinite(difference) else float(logit) - float(peak)


def _bias_rows(logit_bias: Mapping[int, float], vocab_size: int) -> tuple[IdRow, FloatRow]:
    for token_id in logit_bias:
        if not 0 <= token_id < vocab_size:
            raise InvalidRequestError("sampling.logit_bias", token_id, f"token ids must be in 0..{vocab_size - 1}")
    ids = sorted(logit_bias)
    return np.array(ids, dtype=np.int64), np.array([float32(logit_bias[i]) for i in ids], dtype=np.float32)


def _survivors(weights: FloatRow, params: SamplingParams) -> tuple[IdRow, FloatRow]:
    """Token ids, ascending, and weights of what top-k, top-p and min-p leave. The likeliest token's weight is 1."""
    token_ids: IdRow = np.arange(weights.size, dtype=np.int64)
    if 0 < params.top_k < weights.size:
        kept = _heaviest(weights, np.ones(weights.size), params.top_k)
        token_ids, weights = token_ids[kept], weights[kept]
    if params.top_p < 1:
        kept = _heaviest(weights, weights, params.top_p * weights.sum(dtype=np.float64))
        token_ids, weights = token_ids[kept], weights[kept]
    if params.min_p > 0:
        kept = np.flatnonzero(weights >= np.float32(min(params.min_p, 1)))
        token_ids, weights = token_ids[kept], weights[kept]
    return token_ids, weights


def _heaviest(weights: FloatRow, measure: npt.NDArray[np.floating], target: float) -> IdRow:
    """Ascending indices of the largest weights, just enough of them for their summed `measure` to reach `target`.

    A radix select, because a sort of 49152 weights takes more than a millisecond: a float in 0..1 orders as its bits
    do, so three digits of 10 bits, the high one first, narrow down the weight at which the target is reached.
    """
    bits = weights.view(np.int32)
    inside, inside_measure, threshold, before = bits, measure, 0, 0.0
    for shift in (20, 10, 0):
        digits = (inside >> shift) & 1023
        reached = before + np.bincount(digits, weights=inside_measure)[::-1].cumsum()  # from the largest digit down
        step = int(reached.searchsorted(min(target, reached[-1])))  # sums in another order may fall short by rounding
        digit = reached.size - 1 - step
        before = float(reached[step - 1]) if step else before
        threshold |= digit << shift
        inside, inside_measure = inside[digits == digit], inside_measure[digits == digit]
    equal = np.flatnonzero(bits == threshold)
    num_needed = int((before + inside_measure.cumsum(dtype=np.float64)).searchsorted(target)) + 1
    kept = bits > threshold
    kept[equal[:num_needed]] = True
    return np.flatnonzero(kept)


def _largest(values: FloatRow, count: int) -> IdRow:
    """Indices of the `count` largest values, best first, equals by index."""
    if count <= 0:
        return np.empty(0, dtype=np.int64)
    cut = max(values.size - count, 0)
    candidates = np.flatnonzero(values >= np.partition(values, cut)[cut])
    return candidates[np.argsort(-values[candidates], kind="stable")][:count]
