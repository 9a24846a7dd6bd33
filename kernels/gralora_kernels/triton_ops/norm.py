"""Norms of the residual stream, joined with the addition before it. Knows no layer."""

# Triton reads annotations as code and knows only its own.
# ruff: noqa: ANN001, ANN201, PLR0917
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gralora_kernels.triton_ops.early import EARLY_OPTIONS, wait_for_others
from gralora_kernels.triton_ops.memory import gpu_kind
from gralora_kernels.triton_ops.variant import ELEMENT_NAMES, VECTOR_BYTES, Variant

# Widest row -> threads. A program keeps its row in registers, so that memory is read once: 16 elements a thread; with
# 32 of them the compiler spilled.
THREADS = {4096: 256, 16384: 1024}
WARP = {"cuda": 32, "hip": 64}


@triton.jit(do_not_specialize=["hidden_units"])
def norm_kernel(
    y,  # [rows, hidden]
    residual,  # [tokens, hidden]
    x,  # [tokens, hidden] or None
    weight,  # [hidden]
    bias,  # [hidden] or None
    index,  # int64 [rows] or None: all tokens
    hidden_units,  # hidden / ALIGN: a size that is multiplied by ALIGN is known to be a multiple of it
    eps,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
    CENTRES: tl.constexpr,  # the mean is subtracted
):
    """One program: one row of y."""
    wait_for_others()
    hidden = hidden_units * ALIGN
    row = tl.program_id(0).to(tl.int64)
    source = row if index is None else tl.load(index + row)
    c = tl.max_contiguous(tl.multiple_of(tl.arange(0, BLOCK), ALIGN), ALIGN)
    mask = c < hidden
    b_weight = tl.load(weight + c, mask=mask, other=0.0)
    p_residual = residual + source * hidden + c
    b_residual = tl.load(p_residual, mask=mask, other=0.0)
    if x is not None:
        b_x = tl.load(x + source * hidden + c, mask=mask, other=0.0)
        b_residual = (b_residual.to(tl.float32) + b_x.to(tl.float32)).to(residual.dtype.element_ty)
        if index is None:  # behind the last layer nobody reads the sum, and `index` may name a row twice
            tl.store(p_residual, b_residual, mask=mask)
    b_stored = b_residual.to(tl.float32)
    if CENTRES:
        b_stored = tl.where(mask, b_stored - tl.sum(b_stored, 0) / hidden, 0.0)
    b_y = b_stored * tl.rsqrt(tl.sum(b_stored * b_stored, 0) / hidden + eps) * b_weight.to(tl.float32)
    if bias is not None:
        b_y += tl.load(bias + c, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + row * hidden + c, b_y.to(y.dtype.element_ty), mask=mask)


def add_norm(
    y: Tensor, residual: Tensor, x: Tensor | None, weight: Tensor, eps: float, *, bias: Tensor | None = None,
    centres: bool = False,
) -> None:  # fmt: skip
    """residual += x, y = norm(residual), all [tokens, hidden]; without x the residual is only read."""
    _launch(y, residual, x, weight, bias, None, eps, centres=centres)


def norm_rows(
    y: Tensor, residual: Tensor, index: Tensor, *, x: Tensor | None, weight: Tensor, eps: float,
    bias: Tensor | None = None, centres: bool = False,
) -> None:  # fmt: skip
    """y [n, hidden] = norm(residual + x) of the rows in `index` int64 [n], the residual being left as it was."""
    assert index.dtype == torch.int64, index.dtype
    assert index.shape == (len(y),), (index.shape, y.shape)
    _launch(y, residual, x, weight, bias, index, eps, centres=centres)


def _launch(
    y: Tensor, residual: Tensor, x: Tensor | None, weight: Tensor, bias: Tensor | None, index: Tensor | None,
    eps: float, *, centres: bool,
) -> None:  # fmt: skip
    rows, hidden = y.shape
    assert weight.shape == (hidden,), (weight.shape, hidden)
    assert bias is None or bias.shape == (hidden,), hidden
    assert residual.shape == ((rows, hidden) if index is None else (len(residual), hidden)), (residual.shape, y.shape)
    assert x is None or x.shape == residual.shape, residual.shape
    for tensor in (y, residual, x):
        assert tensor is None or (tensor.dtype == y.dtype and tensor.is_contiguous()), (tensor.dtype, tensor.stride())
    constants = constants_for(hidden, y.dtype)
    norm_kernel[(rows,)](
        y, residual, x, weight, bias, index, hidden // constants["ALIGN"], eps,
        **constants, CENTRES=centres, **_options(constants["BLOCK"], gpu_kind()), **EARLY_OPTIONS,
    )  # fmt: skip


def constants_for(hidden: int, dtype: torch.dtype) -> dict[str, int]:
    """The form that rows of this width get: loads of 16 bytes if the width allows it, else of one element."""
    if hidden > max(THREADS):
        raise ValueError(f"rows of {hidden} elements are too wide for the norm kernel, which takes {max(THREADS)}")
    vector = VECTOR_BYTES // dtype.itemsize
    return {"BLOCK": min(width for width in THREADS if hidden <= width), "ALIGN": 1 if hidden % vector else vector}


def _options(block: int, gpu_kind: str) -> dict[str, int]:
    return {"num_warps": THREADS[block] // WARP[gpu_kind]}


def variants(dtype: torch.dtype) -> list[Variant]:
    """Each size in its fullest form (what leaves out x or the index does less), once with weights of fp32, once with a
    mean and a bias."""
    element = f"*{ELEMENT_NAMES[dtype]}"
    tensors = dict.fromkeys(("y", "residual", "x", "weight"), element)
    vector = VECTOR_BYTES // dtype.itemsize
    plain = {"index": None, "bias": None, "CENTRES": False}
    forms: tuple[tuple[str, int, int, dict[str, str], dict[str, bool | None]], ...] = (
        ("add", max(THREADS), vector, tensors, plain),
        ("add", max(THREADS), 1, tensors, plain),
        ("add", min(THREADS), vector, tensors, plain),
        ("centre", max(THREADS), vector, tensors | {"bias": element}, {"index": None, "CENTRES": True}),
        (
            "gather", min(THREADS), vector, tensors | {"weight": "*fp32", "index": "*i64"},
            {"bias": None, "CENTRES": False},
        ),
    )  # fmt: skip
    return [
        Variant(
            name=f"norm, {form}, up to {block}, align {align}",
            function=norm_kernel,
            dtype=dtype,
            constants={"BLOCK": block, "ALIGN": align, **rest},
            pointers=pointers,
            floats=("eps",),
            options={kind: _options(block, kind) for kind in WARP},
            wide_loads=("b_residual", "b_x", "b_weight") if align > 1 else (),
        )
        for form, block, align, pointers, rest in forms
    ]
