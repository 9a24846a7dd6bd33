"""The activation of a feed-forward block, gated or not. Knows no layer."""

# Triton reads annotations as code and knows only its own.
# ruff: noqa: ANN001, ANN201, PLR0917
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gralora_kernels.triton_ops.early import EARLY_OPTIONS, wait_for_others
from gralora_kernels.triton_ops.variant import ELEMENT_NAMES, VECTOR_BYTES, Variant

KINDS = ("silu", "gelu_tanh", "squared_relu")
# Elements a program: one load of 16 bytes a thread on AMD, whose warps are twice as wide, two on NVIDIA. One row of an
# 8B model is 7 programs.
BLOCK = 2048
OPTIONS = {"num_warps": 4}


@triton.jit(do_not_specialize=["width_units"])
def activation_kernel(
    out,  # [tokens, width]
    x,  # [tokens, 2 * width], the gates first; not gated: [tokens, width]
    width_units,  # width / ALIGN: a size that is multiplied by ALIGN is known to be a multiple of it
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """One program: some columns of one token."""
    wait_for_others()
    width = width_units * ALIGN
    token = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.max_contiguous(tl.multiple_of(tl.arange(0, BLOCK), ALIGN), ALIGN)
    mask = c < width
    p_gate = x + token * (1 + GATED) * width + c
    b_gate = tl.load(p_gate, mask=mask, other=0.0).to(tl.float32)
    if KIND == "silu":
        b_out = b_gate * tl.sigmoid(b_gate)
    elif KIND == "squared_relu":
        b_out = tl.maximum(b_gate, 0.0) * tl.maximum(b_gate, 0.0)
    else:  # 0.5 * (1 + tanh(z)) = sigmoid(2 * z), with z = sqrt(2 / pi) * (gate + 0.044715 * gate^3)
        b_out = b_gate * tl.sigmoid(1.5957691216057308 * (b_gate + 0.044715 * b_gate * b_gate * b_gate))
    if GATED:
        b_up = tl.load(p_gate + width, mask=mask, other=0.0)
        b_out *= b_up.to(tl.float32)
    tl.store(out + token * width + c, b_out.to(out.dtype.element_ty), mask=mask)


def activate(out: Tensor, x: Tensor, kind: str, *, gated: bool = True) -> None:
    """out [tokens, width] = act(gate) * up, where x [tokens, 2 * width] has the gates first; not gated: act(x)."""
    tokens, width = out.shape
    assert kind in KINDS, kind
    assert x.shape == (tokens, (1 + gated) * width), (x.shape, out.shape)
    assert x.dtype == out.dtype, (x.dtype, out.dtype)
    assert x.is_contiguous()
    assert out.is_contiguous()
    align = _align(width, out.dtype)
    activation_kernel[(tokens, triton.cdiv(width, BLOCK))](
        out, x, width // align, KIND=kind, GATED=gated, BLOCK=BLOCK, ALIGN=align, **OPTIONS, **EARLY_OPTIONS
    )


def _align(width: int, dtype: torch.dtype) -> int:
    """Loads of 16 bytes if the width allows it, else of one element."""
    vector = VECTOR_BYTES // dtype.itemsize
    return 1 if width % vector else vector


def variants(dtype: torch.dtype) -> list[Variant]:
    """Each activation once, and each kind of width: the two choices do not meet."""
    vector = VECTOR_BYTES // dtype.itemsize
    return [
        Variant(
            name=f"{kind}{'' if gated else ' alone'}, align {align}",
            function=activation_kernel,
            dtype=dtype,
            constants={"KIND": kind, "GATED": gated, "BLOCK": BLOCK, "ALIGN": align},
            pointers=dict.fromkeys(("out", "x"), f"*{ELEMENT_NAMES[dtype]}"),
            options=dict.fromkeys(("cuda", "hip"), OPTIONS),
            wide_loads=(("b_gate", "b_up") if gated else ("b_gate",)) if align > 1 else (),
        )
        for kind, gated, align in (("silu", True, vector), ("gelu_tanh", True, 1), ("squared_relu", False, vector))
    ]
