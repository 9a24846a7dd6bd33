"""Proof, at each start, that this model is computed exactly: our paged, chunked forward against transformers' own."""

from __future__ import annotations

import torch
from torch import Tensor

from gralora_runtime.errors import ModelUnsupportedError
from gralora_runtime.model.loading import BaseModel
from gralora_runtime.model.programs.runner import Runner
from gralora_runtime.plan import AdapterUse, RowPlan, StepPlan
from gralora_runtime.stepping.batch import BatchBuilder

NUM_TOKENS = 40
CHUNKS = (17, 22, 1)  # two unequal prompt chunks and a decode step
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 2e-2}  # of the largest logit


def expected_logits(base: BaseModel) -> Tensor:
    """Last-token logits of a fixed prompt, by the untouched model, fp32 [vocab]. Call before a runner takes it over."""
    with torch.inference_mode():
        logits: Tensor = base.model(_prompt(base)[None], use_cache=False).logits[0, -1].float()
    return logits


def check_runner(base: BaseModel, runner: Runner, batch: BatchBuilder, page_size: int, expected: Tensor) -> None:
    """Raise `ModelUnsupportedError` if the served model does not reproduce `expected`. Writes the first KV pages."""
    tokens = _prompt(base).tolist()
    adapter = AdapterUse(slot=-1, generation=0, width=0)
    pages = tuple(range(-(-NUM_TOKENS // page_size)))
    start = 0
    for count in CHUNKS:
        row = RowPlan("selfcheck", tuple(tokens[start : start + count]), start, pages, adapter, samples=True, seat=0)
        logits = runner.execute(batch.build(StepPlan((row,), int(count == 1))))
        start += count
    error = (logits[0] - expected).abs().max() / expected.abs().max()
    tolerance = TOLERANCE[base.model.dtype]
    if not error <= tolerance:
        problem = f"paged logits differ from transformers' by {error:.2g} of the largest logit (limit {tolerance:g})"
        raise ModelUnsupportedError(base.name, [problem])


def _prompt(base: BaseModel) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, base.model.config.vocab_size, (NUM_TOKENS,), generator=generator)
    return tokens.to(base.model.device)
