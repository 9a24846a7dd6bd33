"""What every program is to the engine: something that computes a step."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from gralora_runtime.batch import StepTensors


class Runner(Protocol):
    """Computes one step."""

    def execute(self, tensors: StepTensors) -> Tensor:
        """Logits of the tokens in `logits_index`, fp32 [sampling rows, vocab]."""
