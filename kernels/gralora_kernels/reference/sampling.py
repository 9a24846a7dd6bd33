"""How a row's next token is chosen, in a few lines of numpy and by sorting: the specification of the kernels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from gralora_kernels.sampling_rules import Rules, SamplingRules

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class SampledRow:
    """Token 0, and nothing else, where `peak` or `best` is not finite. Log-probabilities are of the raw logits."""

    token: int
    peak: np.float32  # the largest logit, NaN if any is
    best: np.float32  # the largest score
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def sample(logits: Tensor, rules: SamplingRules, history: Tensor | None = None) -> list[SampledRow]:
    """A token for each row of `logits` [rows, vocab].

    `history` int32 [slots, vocab]: twice how often a token was written, and one if it is in the prompt; tokens are
    added to it. Wherever numbers are equal, the lowest token id goes first.
    """
    histories = None if history is None else history.numpy()
    with np.errstate(all="ignore"):
        return [_row(row.float().cpu().numpy(), rules, number, histories) for number, row in enumerate(logits)]


def _row(logits: Floats, rules: SamplingRules, number: int, histories: npt.NDArray[np.int32] | None) -> SampledRow:
    rule = rules.rows[number]
    scores = _adjusted(logits, rules, rule, histories)
    token, peak = int(scores.argmax()), logits.max()
    best = scores[token]
    if not (np.isfinite(peak) and np.isfinite(best)):
        return SampledRow(0, peak, best)
    if rule["temperature"] > 0:
        token = _drawn(np.exp((scores - best) / np.float32(rule["temperature"])), rule)
    if histories is not None and rule["history_slot"] >= 0:
        histories[rule["history_slot"], token] += 2
    if rule["num_top"] < 0:
        return SampledRow(token, peak, best)
    logprobs = logits.astype(np.float64) - peak - np.log(np.exp(logits - peak).sum(dtype=np.float64))
    top = np.argsort(-logits, kind="stable")[: rule["num_top"]]
    return SampledRow(token, peak, best, float(logprobs[token]), tuple((int(i), float(logprobs[i])) for i in top))


def _adjusted(logits: Floats, rules: SamplingRules, rule: Rules, histories: npt.NDArray[np.int32] | None) -> Floats:
    scores = _penalised(logits, rules, rule, histories)
    if rule["mask"] < 0:
        return scores
    may_be_chosen = np.unpackbits(rules.masks[rule["mask"]].view(np.uint8), count=len(scores), bitorder="little")
    return np.where(may_be_chosen, scores, np.float32(-np.inf))


def _penalised(logits: Floats, rules: SamplingRules, rule: Rules, histories: npt.NDArray[np.int32] | None) -> Floats:
    scores = logits.copy()
    biases = slice(rule["first_bias"], rule["first_bias"] + rule["num_biases"])
    np.add.at(scores, rules.bias_ids[biases], rules.biases[biases].astype(np.float32))
    if histories is None or rule["history_slot"] < 0:
        return scores
    history = histories[rule["history_slot"]]
    names = ("repetition_penalty", "frequency_penalty", "presence_penalty")
    repetition, frequency, presence = (np.float32(rule[name]) for name in names)
    scores = np.where(history != 0, np.where(scores < 0, scores * repetition, scores / repetition), scores)
    written = (history >> 1).astype(np.float32)
    return np.where(written > 0, scores - written * frequency - presence, scores)


def _drawn(weights: Floats, rule: Rules) -> int:
    """By inverse CDF over the survivors in the order of their ids; the heaviest always survives."""
    kept = np.argsort(-weights, kind="stable")  # heaviest first
    if rule["top_k"] > 0:
        kept = kept[: rule["top_k"]]
    if rule["top_p"] < 1:
        masses = weights[kept].cumsum(dtype=np.float64)
        kept = kept[: int(masses.searchsorted(rule["top_p"] * masses[-1])) + 1]
    kept = np.sort(kept[weights[kept] >= np.float32(rule["min_p"])])
    masses = weights[kept].cumsum(dtype=np.float64)
    return int(kept[masses.searchsorted(rule["uniform"] * masses[-1], side="right")])
