"""What a step takes, from what steps took lately: a line through them. Knows no requests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gralora_runtime.plan import StepPlan

FADING = 0.98  # of a step with the next one
RIDGE = 1e-3

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class StepCost:
    """Of a step: so much, more for each row that decodes, and more for each token of a prompt. In seconds."""

    step_s: float
    row_s: float
    prompt_token_s: float


class StepTimes:
    """What steps took lately, as a line through them. Written by the engine's thread, read by any: sums are replaced
    as a whole."""

    def __init__(self) -> None:
        self._sums: tuple[Array, Array] | None = None  # of the products of facts [3, 3], and of those with seconds [3]
        self._fitted: tuple[object, StepCost] | None = None

    def observe(self, plan: StepPlan, seconds: float) -> None:
        """A step was computed."""
        facts = np.array([1.0, plan.num_decode_rows, plan.num_tokens - plan.num_decode_rows])
        products, with_seconds = (np.zeros((3, 3)), np.zeros(3)) if self._sums is None else self._sums
        self._sums = (FADING * products + np.outer(facts, facts), FADING * with_seconds + seconds * facts)

    def cost(self) -> StepCost | None:
        """None: no step was computed yet."""
        sums, fitted = self._sums, self._fitted
        if sums is None:
            return None
        if fitted is None or fitted[0] is not sums:
            # What the steps so far leave open is kept small, and nothing makes a step shorter.
            products = sums[0] + RIDGE * np.diag(np.diag(sums[0]) + 1.0)
            found = np.maximum(np.linalg.solve(products, sums[1]), 0.0)
            fitted = self._fitted = (sums, StepCost(*map(float, found)))
        return fitted[1]
