"""Queries and keys are normalised and turned by their positions; keys and values go to their pages. Knows no layer."""

# Triton reads annotations as code and knows only its own.
# ruff: noqa: ANN001, ANN201, PLR0917
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from gralora_kernels.triton_ops.early import EARLY_OPTIONS, wait_for_others
from gralora_kernels.triton_ops.variant import ELEMENT_NAMES, VECTOR_BYTES, Variant

# Elements a program, all of one warp: a load of 16 bytes a thread on AMD, whose warps are twice as wide, two on NVIDIA.
# One token of an 8B model is 12 programs of 4 heads, none of which waits for another warp.
TILE = 512
OPTIONS = {"num_warps": 1}
# head_dim, rotary_dim, norms, neighbours: Qwen3 (Llama without its norms); Phi's partial rotary; a half that is no
# multiple of 8; GLM's.
AUDITED = ((128, 128, True, False), (128, 96, False, False), (72, 72, False, False), (128, 64, False, True))


@triton.jit(do_not_specialize=["heads", "kv_heads"])
def rotate_and_store_kernel(
    qkv,  # [tokens, heads + 2 * kv_heads, HEAD_DIM]
    keys,  # [slots, kv_heads, HEAD_DIM]
    values,  # [slots, kv_heads, HEAD_DIM]
    positions,  # [tokens]
    kv_slots,  # int64 [tokens], -1: stored nowhere
    cos,  # fp32 [positions, 2 * HALF]
    sin,
    q_norm,  # [HEAD_DIM] or None
    k_norm,  # [HEAD_DIM] or None
    heads,
    kv_heads,
    eps,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,  # of the columns that are turned: the first 2 * HALF
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGN: tl.constexpr,  # elements: HALF is a multiple of it
    NEIGHBOURS: tl.constexpr,  # column 2 i turns with 2 i + 1, else i with HALF + i
):
    """One program: a few heads of one token. Each row of the tile is a query, a key or a value."""
    wait_for_others()
    token = tl.program_id(0).to(tl.int64)
    position, slot = tl.load(positions + token).to(tl.int64), tl.load(kv_slots + token)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    d = tl.arange(0, BLOCK_D)
    is_turned = d < 2 * HALF
    if NEIGHBOURS:
        is_first = d % 2 == 0
        partner = tl.where(is_first, d + 1, d - 1)
        angle = d // 2
    else:
        is_first = d < HALF
        partner = tl.max_contiguous(tl.multiple_of(tl.where(is_first, d + HALF, d - HALF), ALIGN), ALIGN)
        angle = d
    p_head = qkv + (token * (heads + 2 * kv_heads) + h)[:, None] * HEAD_DIM
    mask = (h < heads + 2 * kv_heads)[:, None] & (d < HEAD_DIM)[None, :]
    m_partner = mask & is_turned[None, :]
    b_x = tl.load(p_head + d[None, :], mask=mask, other=0.0)
    b_partner = tl.load(p_head + partner[None, :], mask=m_partner, other=0.0)
    b_cos = tl.load(cos + position * (2 * HALF) + angle, mask=is_turned, other=1.0)
    b_sin = tl.load(sin + position * (2 * HALF) + angle, mask=is_turned, other=0.0)
    x, x_partner = b_x.to(tl.float32), b_partner.to(tl.float32)
    if q_norm is not None:
        inverse = tl.rsqrt(tl.sum(x * x, 1) / HEAD_DIM + eps)[:, None]
        p_norm = tl.where(h < heads, q_norm, k_norm)[:, None]
        b_norm = tl.load(p_norm + d[None, :], mask=mask, other=0.0)
        b_partner_norm = tl.load(p_norm + partner[None, :], mask=m_partner, other=0.0)
        x *= inverse * b_norm.to(tl.float32)
        x_partner *= inverse * b_partner_norm.to(tl.float32)
    turned = x * b_cos[None, :] + x_partner * tl.where(is_first, -b_sin, b_sin)[None, :]
    is_query, is_value = (h < heads)[:, None], (h >= heads + kv_heads)[:, None]
    turned = turned.to(qkv.dtype.element_ty)
    tl.debug_barrier()  # a query's partners have been read by other threads before it is written
    tl.store(p_head + d[None, :], turned, mask=mask & is_query)
    is_stored = mask & (slot >= 0)
    row = slot * kv_heads + h - heads
    tl.store(keys + row[:, None] * HEAD_DIM + d[None, :], turned, mask=is_stored & ~is_query & ~is_value)
    tl.store(values + (row - kv_heads)[:, None] * HEAD_DIM + d[None, :], b_x, mask=is_stored & is_value)


def rotate_and_store(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    kv_slots: Tensor,
    *,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    kv_heads: int,
    head_dim: int,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    neighbours: bool = False,
) -> None:
    """Queries in place, keys and values to their slots, -1 being none; keys and values stay in qkv as they were.

    qkv [tokens, (heads + 2 * kv_heads) * head_dim]; keys, values [pages, page_size, kv_heads, head_dim]; positions
    (int32 or int64) and kv_slots (int64) [tokens]; cos, sin fp32 [positions, rotary_dim], whose second half is as the
    first; q_norm, k_norm [head_dim]; `neighbours`: column 2 i turns with 2 i + 1, else i with half + i.
    """
    rows = heads + 2 * kv_heads
    tokens = len(qkv)
    assert qkv.shape == (tokens, rows * head_dim), (qkv.shape, heads, kv_heads, head_dim)
    assert keys.shape == values.shape, (keys.shape, values.shape)
    assert keys.shape[2:] == (kv_heads, head_dim), (keys.shape, kv_heads, head_dim)
    assert qkv.dtype == keys.dtype == values.dtype, (qkv.dtype, keys.dtype, values.dtype)
    assert positions.shape == kv_slots.shape == (tokens,), (positions.shape, kv_slots.shape, tokens)
    assert cos.shape == sin.shape, (cos.shape, sin.shape)
    assert cos.dtype == sin.dtype == torch.float32, (cos.dtype, sin.dtype)
    assert kv_slots.dtype == torch.int64, kv_slots.dtype
    assert (q_norm is None) == (k_norm is None), "queries and keys are normalised both or neither"
    assert all(tensor.is_contiguous() for tensor in (qkv, keys, values, cos, sin)), "a tensor is not contiguous"
    constants = constants_for(head_dim, cos.shape[1], qkv.dtype, neighbours=neighbours)
    rotate_and_store_kernel[(tokens, triton.cdiv(rows, constants["BLOCK_H"]))](
        qkv, keys, values, positions, kv_slots, cos, sin, q_norm, k_norm, heads, kv_heads, eps,
        **constants, **OPTIONS, **EARLY_OPTIONS,
    )  # fmt: skip


def constants_for(head_dim: int, rotary_dim: int, dtype: torch.dtype, *, neighbours: bool) -> dict[str, int]:
    """The form that a model's heads get."""
    half, block = rotary_dim // 2, triton.next_power_of_2(head_dim)
    return {
        "HEAD_DIM": head_dim,
        "HALF": half,
        "BLOCK_H": max(TILE // block, 1),
        "BLOCK_D": block,
        "ALIGN": gcd(half, VECTOR_BYTES // dtype.itemsize),
        "NEIGHBOURS": neighbours,
    }


def variants(dtype: torch.dtype) -> list[Variant]:
    """The forms for the heads of well-known models; every other head gets its own."""
    element = f"*{ELEMENT_NAMES[dtype]}"
    pointers = dict.fromkeys(("qkv", "keys", "values"), element) | dict.fromkeys(("positions", "kv_slots"), "*i64")
    pointers |= dict.fromkeys(("cos", "sin"), "*fp32")
    norms = ("q_norm", "k_norm")
    return [
        Variant(
            name=f"rotary, {rotary_dim} of {head_dim}{', norms' * has_norms}{', neighbours' * neighbours}",
            function=rotate_and_store_kernel,
            dtype=dtype,
            constants=constants_for(head_dim, rotary_dim, dtype, neighbours=neighbours)
            | ({} if has_norms else dict.fromkeys(norms)),
            pointers=pointers | (dict.fromkeys(norms, element) if has_norms else {}),
            floats=("eps",),
            options=dict.fromkeys(("cuda", "hip"), OPTIONS),
            wide_loads=("b_x", "b_partner")
            if not neighbours and rotary_dim // 2 * dtype.itemsize % VECTOR_BYTES == 0
            else ("b_x",),
        )
        for head_dim, rotary_dim, has_norms, neighbours in AUDITED
    ]
