"""What one would run instead: transformers' generate on merged models, and PEFT switching adapters."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from benchmarks.measurement import Answer, Run
from benchmarks.workload import Request


class TokenClock(StoppingCriteria):  # type: ignore[misc]  # transformers is untyped here
    """Never stops; notes when each token came."""

    def __init__(self) -> None:
        self.times_s: list[float] = []
        self._started_s = time.perf_counter()

    def __call__(self, input_ids: Tensor, _scores: Tensor, **_: Any) -> Tensor:
        self.times_s.append(time.perf_counter() - self._started_s)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def generate(model: PreTrainedModel | PeftModel, requests: Sequence[Request], *, started_s: float | None = None) -> Run:
    """One batch of transformers' generate. Prompts are equally long, so that nothing is padded."""
    ids = torch.tensor([request.prompt for request in requests])
    model.generation_config.eos_token_id = None
    clock = TokenClock()
    delay_s = 0.0 if started_s is None else time.perf_counter() - started_s
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=requests[0].max_tokens,
        do_sample=False,
        pad_token_id=0,
        stopping_criteria=StoppingCriteriaList([clock]),
    )
    tokens = out[:, ids.shape[1] :].tolist()
    times_s = tuple(delay_s + time_s for time_s in clock.times_s)
    return Run(tuple(Answer(request, tuple(row), times_s) for request, row in zip(requests, tokens, strict=True)))


class PeftSwitcher:
    """One base model with all adapters beside it; `set_adapter` before each request, as PEFT's users do."""

    def __init__(self, base: PreTrainedModel, adapters: Sequence[Path]) -> None:
        first, *others = adapters
        self._model = PeftModel.from_pretrained(base, first, adapter_name=first.name)
        for path in others:
            self._model.load_adapter(path, adapter_name=path.name)
        self._model.eval()

    def run(self, request: Request) -> Run:
        """Switching is part of the request's time."""
        started_s = time.perf_counter()
        self._model.set_adapter(request.adapter)
        return generate(self._model, [request], started_s=started_s)
