"""What a step's rows are sampled by, as data: the one place where the columns have names. Plain numpy; knows no kernel.

A row of `RULE` is all that a kernel reads of a row's request. An engine makes one when a request begins, with `rule`,
and for each step sets `uniform` and `history_slot`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

# All fields are words of 8 bytes, of which kernels know the place.
RULE = np.dtype(
    [
        ("uniform", "f8"),  # in [0, 1), see philox.py; unused at temperature 0
        ("temperature", "f8"),  # 0: the largest score
        ("top_p", "f8"),  # 1: off
        ("min_p", "f8"),  # 0: off
        ("repetition_penalty", "f8"),  # 1: off
        ("frequency_penalty", "f8"),  # 0: off
        ("presence_penalty", "f8"),  # 0: off
        ("top_k", "i8"),  # 0: off
        ("history_slot", "i8"),  # -1: none, so that no penalty applies
        ("num_top", "i8"),  # alternatives that are reported; -1: no log-probabilities at all
        ("first_bias", "i8"),  # of its run of `SamplingRules.bias_ids`
        ("num_biases", "i8"),
        ("mask", "i8"),  # its row of `SamplingRules.masks`; -1: any token may be chosen
    ]
)
COLUMNS = {name: number for number, name in enumerate(RULE.names or ())}
WORDS = len(COLUMNS)
MAX_TOP = 20

Rules = npt.NDArray[np.void]  # of RULE
Ids = npt.NDArray[np.int64]
Biases = npt.NDArray[np.float64]
Masks = npt.NDArray[np.int32]

FLOAT32 = np.finfo(np.float32)
SMALLEST_TEMPERATURE = float(FLOAT32.tiny)  # below it the float32 quotient would be 0 / 0
LARGEST = float(FLOAT32.max)


def rule(
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    frequency_penalty: float = 0.0,
    presence_penalty: float = 0.0,
    num_top: int = -1,
) -> Rules:
    """[1], with all that is computed in float32 rounded to it, and finite there."""
    row = np.zeros(1, RULE)
    row["temperature"] = float32(max(temperature, SMALLEST_TEMPERATURE)) if temperature > 0 else 0
    row["top_p"], row["min_p"] = top_p, np.float32(min(min_p, 1))
    row["repetition_penalty"] = float32(repetition_penalty)
    row["frequency_penalty"] = float32(frequency_penalty)
    row["presence_penalty"] = float32(presence_penalty)
    row["top_k"], row["num_top"], row["history_slot"], row["mask"] = top_k, num_top, -1, -1
    return row


def float32(value: float) -> np.float32:
    """The nearest finite number of float32: an infinite parameter would make NaN of a score that is infinite or 0."""
    return np.float32(min(max(value, -LARGEST), LARGEST))


@dataclass(frozen=True, slots=True)
class SamplingRules:
    """Of one step. `bias_ids` ascend within a row; a bias of -inf bans its token. An id may stand there twice.

    Of a row with a mask only those tokens may be chosen whose bit is set: bit i % 32 of word i // 32 is token i's.
    """

    rows: Rules  # [rows]
    bias_ids: Ids = field(default_factory=lambda: np.empty(0, np.int64))  # [biases]
    biases: Biases = field(default_factory=lambda: np.empty(0, np.float64))  # [biases], finite in float32 or -inf
    masks: Masks = field(default_factory=lambda: np.empty((0, 0), np.int32))  # [masked rows, words]

    @property
    def are_adjusted(self) -> npt.NDArray[np.bool_]:
        """[rows]: whose scores are not simply the logits."""
        return (self.rows["history_slot"] >= 0) | (self.rows["num_biases"] > 0) | (self.rows["mask"] >= 0)

    @property
    def are_sampled(self) -> npt.NDArray[np.bool_]:
        """[rows]: that take a random number."""
        return np.asarray(self.rows["temperature"] > 0)

    @property
    def are_filtered(self) -> npt.NDArray[np.bool_]:
        """[rows]: sampled from a part of the vocabulary."""
        rows = self.rows
        return self.are_sampled & ((rows["top_k"] > 0) | (rows["top_p"] < 1) | (rows["min_p"] > 0))

    @property
    def are_reported(self) -> npt.NDArray[np.bool_]:
        """[rows]: whose log-probabilities are wanted."""
        return np.asarray(self.rows["num_top"] >= 0)

    def words(self) -> Ids:
        """Rows, bias ids and biases in one array, each beginning at a multiple of 16 bytes: see `bias_words`."""
        ids, biases = bias_words(len(self.rows), len(self.bias_ids))
        words = np.zeros(biases + len(self.biases), np.int64)
        words[: len(self.rows) * WORDS] = self.rows.view(np.int64)
        words[ids : ids + len(self.bias_ids)] = self.bias_ids
        words[biases:] = self.biases.view(np.int64)
        return words


def bias_words(num_rows: int, num_biases: int) -> tuple[int, int]:
    """Where bias ids and biases begin in `SamplingRules.words`."""
    ids = num_rows * WORDS
    ids += ids % 2
    return ids, ids + num_biases + num_biases % 2


def with_biases(rows: Rules, biases: list[dict[int, float]]) -> SamplingRules:
    """`rows` [rows] with the biases of each, by token id: what tests and small callers need."""
    rows = rows.copy()
    counts = [len(of_row) for of_row in biases]
    rows["num_biases"] = counts
    rows["first_bias"] = np.cumsum([0, *counts[:-1]])
    pairs = [pair for of_row in biases for pair in sorted(of_row.items())]
    ids, values = zip(*pairs, strict=True) if pairs else ((), ())
    return SamplingRules(rows, np.array(ids, np.int64), np.array(values, np.float64))
