"""Tokens that one step chose and the next one reads, on the device. Knows no model."""

# Triton reads annotations as code and knows only its own.
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gralora_kernels.triton_ops.variant import Variant

BLOCK = 256
OPTIONS = {"num_warps": 4}


@triton.jit(do_not_specialize=["count"])
def follow_kernel(
    token_ids,  # int32 [count]
    follows,  # int32 [count]
    newest,  # int32: what the rows of the step before chose
    count,
    BLOCK: tl.constexpr,
):
    """One program: `BLOCK` tokens."""
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_follows = tl.load(follows + t, mask=t < count, other=-1)
    is_unknown = b_follows >= 0
    b_tokens = tl.load(newest + b_follows, mask=is_unknown, other=0)
    tl.store(token_ids + t, b_tokens, mask=is_unknown)


def follow(token_ids: Tensor, follows: Tensor, newest: Tensor) -> None:
    """token_ids[t] = newest[follows[t]] where follows[t] >= 0; all int32, and as many of the first two."""
    assert token_ids.dtype == follows.dtype == newest.dtype == torch.int32
    assert token_ids.shape == follows.shape, (token_ids.shape, follows.shape)
    count = len(token_ids)
    follow_kernel[(triton.cdiv(count, BLOCK),)](token_ids, follows, newest, count, BLOCK=BLOCK, **OPTIONS)


def variants(dtype: torch.dtype) -> list[Variant]:
    """One, whatever the model's dtype."""
    return [
        Variant(
            name="follow",
            function=follow_kernel,
            dtype=dtype,
            constants={"BLOCK": BLOCK},
            pointers=dict.fromkeys(("token_ids", "follows", "newest"), "*i32"),
            options=dict.fromkeys(("cuda", "hip"), OPTIONS),
        )
    ]
