"""One compiled form of a kernel, as data: what launches it and what audits it read the same record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

VECTOR_BYTES = 16  # the widest load
# Memory that a kernel is handed is aligned for the widest load; what it takes of numbers is unknown to the compiler.
ELEMENT_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A kernel with its constants, for elements of one dtype."""

    name: str  # kernel, and which of its forms
    function: Any  # of triton.jit
    dtype: torch.dtype
    constants: Mapping[str, Any]  # by argument
    pointers: Mapping[str, str]  # what an argument points to, in Triton's names; all others are int32
    floats: tuple[str, ...] = ()  # arguments that are fp32 numbers
    # Of the compiler, by "cuda" and "hip"; launched on those that are named.
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    wide_loads: tuple[str, ...] = ()  # names that loads are assigned to, each of which must be 16 bytes
    is_product: bool = False  # must use matrix instructions, but in fp32, for which NVIDIA has none
    # Variants of one family must use the same matrix instruction: a token's neighbours decide which of them it meets.
    family: str = ""
