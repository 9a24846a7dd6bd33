"""A linear layer whose rows do not depend on how many they are: one order of summation. Knows no model."""

# Triton reads annotations as code and knows only its own.
# ruff: noqa: ANN001, ANN201, PLR0917
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gralora_kernels.triton_ops.memory import gpu_kind
from gralora_kernels.triton_ops.variant import ELEMENT_NAMES, VECTOR_BYTES, Variant

# Tokens a tile: 16 are the least that tensor cores take, 32 the most that get the same instruction on every GPU (64
# would get Hopper's wgmma, which sums in another order).
TILES = (16, 32)
BLOCK_N = 64  # output columns a program: one token is 64 programs for 4,096 columns
BLOCK_K_BYTES = 256  # of a row, a round of the loop
# Rounds in flight. AMD keeps them in 64 KB of shared memory, NVIDIA's smallest (sm_86, sm_89) in 99. Loads of single
# elements get no more than two: in fp32 the compiler spilled.
STAGES = {"cuda": 4, "hip": 2}
STAGES_OF_SINGLES = 2


@triton.jit(do_not_specialize=["tokens", "in_units", "out_features"])
def linear_kernel(
    out,  # [tokens, out_features]
    x,  # [tokens, in_features]
    weight,  # [out_features, in_features]
    bias,  # [out_features] or None
    tokens,
    in_units,  # in_features / ALIGN: a size that is multiplied by ALIGN is known to be a multiple of it
    out_features,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """One program: a token tile times some output columns, summed in the order of the input."""
    in_features = in_units * ALIGN
    t = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_t, m_o = t < tokens, o < out_features
    p_x = x + t.to(tl.int64) * in_features
    p_weight = weight + o.to(tl.int64) * in_features
    b_out = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, in_features, BLOCK_K):
        i = start + tl.max_contiguous(tl.multiple_of(tl.arange(0, BLOCK_K), ALIGN), ALIGN)
        m_i = i < in_features
        b_x = tl.load(p_x[:, None] + i[None, :], mask=m_t[:, None] & m_i[None, :], other=0.0)
        b_weight = tl.load(p_weight[None, :] + i[:, None], mask=m_o[None, :] & m_i[:, None], other=0.0)
        b_out = tl.dot(b_x, b_weight, b_out, input_precision="ieee")
    if bias is not None:
        b_bias = tl.load(bias + o, mask=m_o, other=0.0)
        b_out += b_bias.to(tl.float32)[None, :]
    p_out = out + t.to(tl.int64)[:, None] * out_features + o[None, :]
    tl.store(p_out, b_out.to(out.dtype.element_ty), mask=m_t[:, None] & m_o[None, :])


def linear(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """out [tokens, out] = x [tokens, in] @ weight [out, in].T + bias [out]."""
    (tokens, in_features), out_features = x.shape, len(weight)
    assert out.shape == (tokens, out_features), (out.shape, tokens, out_features)
    assert weight.shape == (out_features, in_features), (weight.shape, x.shape)
    assert bias is None or bias.shape == (out_features,), (bias.shape, out_features)
    for tensor in (out, x, weight):
        assert tensor.dtype == x.dtype, (tensor.dtype, x.dtype)
        assert tensor.is_contiguous(), tensor.stride()
    constants = constants_for(tokens, in_features, x.dtype)
    tiles = triton.cdiv(tokens, constants["BLOCK_M"]), triton.cdiv(out_features, BLOCK_N)
    linear_kernel[tiles](
        out, x, weight, bias, tokens, in_features // constants["ALIGN"], out_features,
        **constants, **_options(constants["ALIGN"], gpu_kind()),
    )  # fmt: skip


def constants_for(tokens: int, in_features: int, dtype: torch.dtype) -> dict[str, int]:
    """The form that a product gets: loads of 16 bytes if the width allows it, else of one element."""
    vector = VECTOR_BYTES // dtype.itemsize
    small, full = TILES
    return _constants(small if tokens <= small else full, 1 if in_features % vector else vector, dtype)


def _constants(tile: int, align: int, dtype: torch.dtype) -> dict[str, int]:
    return {"BLOCK_M": tile, "BLOCK_N": BLOCK_N, "BLOCK_K": BLOCK_K_BYTES // dtype.itemsize, "ALIGN": align}


def _options(align: int, gpu_kind: str) -> dict[str, Any]:
    """Compiler options. On AMD the instruction's shape would follow the tile's, and with it the order of sums."""
    common = {"num_warps": 4, "num_stages": STAGES[gpu_kind] if align > 1 else STAGES_OF_SINGLES}
    return common | {"matrix_instr_nonkdim": 16} if gpu_kind == "hip" else common


def variants(dtype: torch.dtype) -> list[Variant]:
    """Every form that may be launched, with a bias: without one it does the same and adds nothing."""
    return [
        Variant(
            name=f"linear, {tile} tokens, align {align}",
            function=linear_kernel,
            dtype=dtype,
            constants=_constants(tile, align, dtype),
            pointers=dict.fromkeys(("out", "x", "weight", "bias"), f"*{ELEMENT_NAMES[dtype]}"),
            options={kind: _options(align, kind) for kind in STAGES},
            wide_loads=("b_x", "b_weight") if align > 1 else (),
            is_product=True,
            family="linear",
        )
        for tile in TILES
        for align in (VECTOR_BYTES // dtype.itemsize, 1)
    ]
