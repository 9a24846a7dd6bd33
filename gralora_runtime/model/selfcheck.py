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
FIRST_CHUNK = 17  # then a second, and the last token as a decode step
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 2e-2}  # of the largest logit


def expected_logits(base: BaseModel) -> Tensor:
    """Logits of a fixed prompt, by the untouched model, fp32 [tokens, vocab]. Call before a runner takes it over."""
    with torch.inference_mode():
        logits: Tensor = base.model(_prompt(base)[None], use_cache=False).logits[0].float()
    return logits


def check_runner(
    base: BaseModel,
    runner: Runner,
    batch: BatchBuilder,
    page_size: int,
    expected: Tensor,
    *,
    max_num_tokens: int = NUM_TOKENS,
    max_model_len: int = NUM_TOKENS,
) -> None:
    """Raise `ModelUnsupportedError` if the served model does not reproduce `expected`. Writes the first KV pages.

    The prompt is as long as a sequence may be, in steps of as many tokens as are served.
    """
    tokens = _prompt(base).tolist()[:max_model_len]
    adapter = AdapterUse(slot=-1, generation=0, width=0)
    pages = tuple(range(-(-len(tokens) // page_size)))
    start = 0
    while start < len(tokens):
        left = len(tokens) - start
        count = min(max_num_tokens, left if left == 1 else left - 1, FIRST_CHUNK if start == 0 else left)
        row = RowPlan("selfcheck", tuple(tokens[start : start + count]), start, pages, adapter, samples=True, seat=0)
        logits = runner.execute(batch.build(StepPlan((row,), int(count == 1))))
        start += count
    expected = expected[len(tokens) - 1]
    error = (logits[0] - expected).abs().max() / expected.abs().max()
    tolerance = TOLERANCE[base.model.dtype]
    if not error <= tolerance:
        problem = f"paged logits differ from transformers' by {error:.2g} of the largest logit (limit {tolerance:g})"
        raise ModelUnsupportedError(base.name, [problem])


def _prompt(base: BaseModel) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, base.model.config.vocab_size, (NUM_TOKENS,), generator=generator)
    return tokens.to(base.model.device)
