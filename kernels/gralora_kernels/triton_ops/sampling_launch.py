"""Sampling on one device: memory and launches. A step is two of them if all rows are greedy, at most six."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import Any

import torch
import triton
from torch import Tensor

from gralora_kernels.sampling_rules import MAX_TOP, WORDS, SamplingRules, bias_words
from gralora_kernels.triton_ops import sampling as kernels
from gralora_kernels.triton_ops.early import EARLY_OPTIONS
from gralora_kernels.triton_ops.memory import at_least, gpu_kind, staged
from gralora_kernels.triton_ops.variant import ELEMENT_NAMES, VECTOR_BYTES, Variant

# Tokens of a split: one row of an 8B model's vocabulary is 32 programs, each with 16 tokens a thread.
SPLIT = 4096
MASK_BITS = 32  # of a word
BLOCK = 1024  # candidates that are looked at at once, with eight thresholds each
# Sums and products apart, as the host has them: 512 threads on both, so that each loads 16 bytes of a split.
OPTIONS: dict[str, dict[str, Any]] = {
    "cuda": {"num_warps": 16, "enable_fp_fusion": False},
    "hip": {"num_warps": 8, "enable_fp_fusion": False},
}
SPLITS, OCTAVES, TOPS = (size.value for size in (kernels.SPLITS, kernels.OCTAVES, kernels.TOPS))
MAX_VOCAB = SPLIT * SPLITS


@dataclass(frozen=True, slots=True)
class Sampled:
    """Of rows 0.. of the last step, in memory that never moves.

    Where `peaks` or `bests` is not finite there is no token, and `tokens` says 0. Log-probabilities are of rows that
    asked for them alone, and of as many of the likeliest tokens as they asked for.
    """

    tokens: Tensor  # int32 [max_rows]
    peaks: Tensor  # fp32 [max_rows]: the largest logit, NaN if any is
    bests: Tensor  # fp32 [max_rows]: the largest score after biases, penalties and masks, NaN if any is
    logprobs: Tensor  # fp32 [max_rows]: of the token
    top_ids: Tensor  # int32 [max_rows, MAX_TOP]
    top_logprobs: Tensor  # fp32 [max_rows, MAX_TOP]


class RowSampler:
    """Samples steps of at most `max_rows` rows. Calls belong on one stream."""

    def __init__(self, vocab: int, max_rows: int, device: torch.device) -> None:
        if vocab > MAX_VOCAB:
            raise ValueError(f"a vocabulary of {vocab} tokens is too large for sampling, which takes {MAX_VOCAB}")
        self._vocab = vocab
        self._max_rows = max_rows
        self._device = device
        self.sampled = Sampled(
            tokens=self._zeros(torch.int32),
            peaks=self._zeros(torch.float32),
            bests=self._zeros(torch.float32),
            logprobs=self._zeros(torch.float32),
            top_ids=self._zeros(torch.int32, MAX_TOP),
            top_logprobs=self._zeros(torch.float32, MAX_TOP),
        )
        self._part_peaks, self._part_bests = (self._empty(torch.float32, SPLITS) for _ in range(2))
        self._part_ids = self._empty(torch.int32, SPLITS)
        self._masses, self._sums = (self._empty(torch.float64, SPLITS) for _ in range(2))
        self._octaves = self._empty(torch.int32, SPLITS, OCTAVES)
        self._top_keys, self._part_top_ids = (self._empty(torch.int32, SPLITS, TOPS) for _ in range(2))
        self._words = torch.empty(0, dtype=torch.int64, device=device)
        self._scores = torch.empty(0, dtype=torch.float32, device=device)
        self._candidates = torch.empty(0, dtype=torch.int32, device=device)
        self._masks = torch.empty(0, dtype=torch.int32, device=device)
        self._no_history = torch.zeros(0, dtype=torch.int32, device=device)

    def reserve(self) -> None:
        """All that any step may need, now: eight bytes for each logit of a full step, and a bit."""
        self._scores = at_least(self._scores, self._max_rows * self._vocab)
        self._candidates = at_least(self._candidates, self._max_rows * self._vocab)
        self._masks = at_least(self._masks, self._max_rows * triton.cdiv(self._vocab, MASK_BITS))

    def sample(self, logits: Tensor, rules: SamplingRules, history: Tensor | None = None) -> Sampled:
        """A token for each row of `logits` [rows, vocab], without waiting for the device.

        `history` int32 [slots, vocab]: twice how often a token was written, and one if it is in the prompt; a row's
        token is added to its slot, and no two rows have the same one. Returns `sampled`.
        """
        rows = len(rules.rows)
        self._check(logits, rules, history)
        if not rows:
            return self.sampled
        self._upload(rules)
        align = _align(logits)
        sizes = self._vocab // align, logits.stride(0) // align
        constants = {"SPLIT": SPLIT, "ALIGN": align}
        options = OPTIONS[gpu_kind()] | EARLY_OPTIONS
        splits = (rows, triton.cdiv(self._vocab, SPLIT))
        found, adjusts, samples = self.sampled, bool(rules.are_adjusted.any()), bool(rules.are_sampled.any())
        filters, reports = bool(rules.are_filtered.any()), bool(rules.are_reported.any())
        numel = rows * self._vocab
        self._scores = at_least(self._scores, numel if adjusts else 0)
        self._candidates = at_least(self._candidates, numel if filters else 0)
        integers, numbers = self._words, self._words.view(torch.float64)
        bias_ids, biases = bias_words(rows, len(rules.bias_ids))
        read = (logits, self._scores, numbers, integers)
        parts = (self._part_peaks, self._part_bests)
        history = self._no_history if history is None else history

        kernels.scan_kernel[splits](
            *parts, self._part_ids, self._scores, logits, numbers, integers, integers[bias_ids:], numbers[biases:],
            history, self._masks, rules.masks.shape[1], *sizes, ADJUSTS=adjusts, **constants, **options,
        )  # fmt: skip
        if samples:
            kernels.weigh_kernel[splits](self._masses, self._octaves, *read, *parts, *sizes, **constants, **options)
        if filters:
            kernels.gather_kernel[splits](
                self._candidates, *read, *parts, self._masses, self._octaves, *sizes, **constants, **options
            )
        kernels.choose_kernel[rows,](
            found.tokens, found.peaks, found.bests, history, *read, *parts, self._part_ids, self._masses, self._octaves,
            self._candidates, *sizes, BLOCK=BLOCK, SAMPLES=samples, **constants,
            **_choose_options(align, gpu_kind()), **EARLY_OPTIONS,
        )  # fmt: skip
        if reports:
            tops = (self._top_keys, self._part_top_ids, self._sums)
            kernels.tops_kernel[splits](*tops, logits, integers, parts[0], *sizes, **constants, **options)
            kernels.report_kernel[rows,](
                found.logprobs, found.top_ids, found.top_logprobs, found.tokens, logits, integers, *parts, *tops,
                *sizes, MOST=MAX_TOP, **constants, **options,
            )  # fmt: skip
        return found

    def _upload(self, rules: SamplingRules) -> None:
        words = rules.words()
        # Room for a pair of words more: what lies behind the rows is somewhere, even if it is empty.
        self._words = at_least(self._words, max(len(words), self._max_rows * WORDS) + 2)
        self._words[: len(words)].copy_(staged(torch.from_numpy(words), self._device), non_blocking=True)
        if rules.masks.size:
            self._masks = at_least(self._masks, rules.masks.size)
            masks = staged(torch.from_numpy(rules.masks).flatten(), self._device)
            self._masks[: rules.masks.size].copy_(masks, non_blocking=True)

    def _check(self, logits: Tensor, rules: SamplingRules, history: Tensor | None) -> None:
        assert len(rules.rows) <= self._max_rows, (len(rules.rows), self._max_rows)
        assert logits.shape == (len(rules.rows), self._vocab), (logits.shape, len(rules.rows), self._vocab)
        assert logits.stride(1) == 1, logits.stride()
        assert (rules.rows["mask"] < len(rules.masks)).all(), len(rules.masks)
        assert not len(rules.masks) or rules.masks.shape[1] * MASK_BITS >= self._vocab, rules.masks.shape
        if history is None:
            assert (rules.rows["history_slot"] < 0).all()
        else:
            assert history.dtype == torch.int32, history.dtype
            assert history.is_contiguous(), history.stride()
            assert history.shape[1] == self._vocab, (history.shape, self._vocab)
            assert (rules.rows["history_slot"] < len(history)).all(), len(history)

    def _zeros(self, dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.zeros(self._max_rows, *shape, dtype=dtype, device=self._device)

    def _empty(self, dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(self._max_rows, *shape, dtype=dtype, device=self._device)


def _align(logits: Tensor) -> int:
    """Loads of 16 bytes if rows and vocabulary allow it, else of one element."""
    vector = VECTOR_BYTES // logits.dtype.itemsize
    return vector if gcd(logits.shape[1], logits.stride(0)) % vector == 0 else 1


def _choose_options(align: int, gpu_kind: str) -> dict[str, Any]:
    """NVIDIA's assembler spills with the limit where loads are of single elements, and elsewhere without it."""
    return OPTIONS[gpu_kind] | ({"maxnreg": 128} if gpu_kind == "cuda" and align > 1 else {})


# Form, kernel, what it leaves out, loads that must be wide: of fp32 those of logits and scores are one instruction.
WEIGHTS = ("b_scores", "b_logits")
FORMS: tuple[tuple[str, Any, dict[str, bool], tuple[str, ...]], ...] = (
    ("scan", kernels.scan_kernel, {"ADJUSTS": True}, ("b_logits", "b_history")),
    ("scan, no adjustments", kernels.scan_kernel, {"ADJUSTS": False}, ("b_logits",)),
    ("weigh", kernels.weigh_kernel, {}, WEIGHTS),
    ("gather", kernels.gather_kernel, {}, WEIGHTS),
    ("choose", kernels.choose_kernel, {"SAMPLES": True}, WEIGHTS),
    ("choose, greedy", kernels.choose_kernel, {"SAMPLES": False}, ()),
    ("tops", kernels.tops_kernel, {}, ("b_logits",)),
    ("report", kernels.report_kernel, {}, ()),
)


def variants(dtype: torch.dtype) -> list[Variant]:
    """Every form, and with loads of single elements too."""
    pointers = dict.fromkeys(("part_peaks", "part_bests", "scores", "peaks", "bests", "logprobs"), "*fp32")
    pointers |= dict.fromkeys(("part_ids", "history", "octaves", "candidates", "tokens"), "*i32")
    pointers |= dict.fromkeys(("top_keys", "part_top_ids", "top_ids", "masks"), "*i32")
    pointers |= dict.fromkeys(("numbers", "biases", "masses", "sums"), "*fp64")
    pointers |= dict.fromkeys(("integers", "bias_ids"), "*i64")
    pointers |= {"top_logprobs": "*fp32", "logits": f"*{ELEMENT_NAMES[dtype]}"}
    constants = {"SPLIT": SPLIT, "BLOCK": BLOCK, "MOST": MAX_TOP}
    found = []
    for align in (VECTOR_BYTES // dtype.itemsize, 1):
        for name, kernel, flags, loads in FORMS:
            wide = loads[:1] if loads == WEIGHTS and dtype == torch.float32 else loads
            values = constants | flags | {"ALIGN": align}
            found.append(
                Variant(
                    name=f"sampling, {name}, align {align}",
                    function=kernel,
                    dtype=dtype,
                    constants={key: value for key, value in values.items() if key in kernel.arg_names},
                    pointers={key: value for key, value in pointers.items() if key in kernel.arg_names},
                    options={kind: _choose_options(align, kind) for kind in OPTIONS}
                    if kernel is kernels.choose_kernel
                    else OPTIONS,
                    wide_loads=wide if align > 1 else (),
                )
            )
    return found
