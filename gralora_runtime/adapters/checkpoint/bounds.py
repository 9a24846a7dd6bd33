"""What the norm of an update cannot exceed, told from its matrices alone and without their product. Knows no file.

First from the largest magnitude of each matrix, which loading has to find anyway; where that leaves too much open, from
the sums of squares of packed matrices. In numpy, a row at a time: threads that torch or BLAS start would spin against
those that decode.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from struct import Struct

import numpy as np
import torch
from torch import Tensor

from gralora_kernels.packing import Array
from gralora_kernels.tables import Entry, Storage
from gralora_runtime.adapters.checkpoint.plan import Plan, room_numel
from gralora_runtime.adapters.checkpoint.remembered import remembered
from gralora_runtime.adapters.checkpoint.spec import ModuleShape
from gralora_runtime.adapters.checkpoint.tensors import TensorInfo

ROW = 8192  # elements: OpenBLAS stays in the calling thread up to 10,000
PIECE = 1 << 16  # elements of 16 bits that are widened at a time, so that what they become stays in a cache
MARGIN = 1.0 + 1e-3  # norms that are compared with a bound are themselves rounded
LARGEST = math.sqrt(np.finfo(np.float32).max)  # norms above it have no square in float32
# Of a square: float32 adds up a row, and a pool may hold float32 as bfloat16 or float16. Of each element: what either
# loses of numbers that are too small for it.
SQUARES_MARGIN = 1.0 + 2e-2
SQUARE_LOST = 2.0**-40

INFINITE = {"F16": 0x7C00, "BF16": 0x7F80}  # these bits and all above are no finite number
_BITS, _FLOAT16, _FLOAT32 = Struct("<H"), Struct("<e"), Struct("<f")  # a fifth of the time of numpy's scalars

DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}  # of a pool
KEPT = {Storage.FLOAT16: "F16", Storage.BFLOAT16: "BF16"}  # in a pool of float32


def largest_magnitude(values: Array, dtype: str) -> float:
    """Of flat values; infinite if one is no number. 16 bits come as bits. Takes no memory."""
    if not len(values):
        return 0.0
    if dtype not in ("F16", "BF16"):
        found = max(-float(values.min()), float(values.max()))
        return math.inf if math.isnan(found) else found
    # Without their sign, bits are ordered as the values that they stand for, and NaN is above all. Read as signed, the
    # largest is the largest of the positive ones; as unsigned, of the negative ones if there are any.
    signed, unsigned = np.maximum.reduce(values.view(np.int16)), np.maximum.reduce(values.view(np.uint16))
    bits = max(int(signed), int(unsigned) & 0x7FFF)
    if bits >= INFINITE[dtype]:
        return math.inf
    (number,) = _FLOAT16.unpack(_BITS.pack(bits)) if dtype == "F16" else _FLOAT32.unpack(b"\0\0" + _BITS.pack(bits))
    return float(number)


def magnitudes_of(bits: Array, dtype: str) -> Array:
    """Float64 numbers of what bits without a sign stand for: F32, F16 or BF16. Infinite if one is no number."""
    if dtype == "BF16":
        values = (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    else:
        values = bits.view(np.float16 if dtype == "F16" else np.float32)
    return np.where(np.isfinite(values), values, np.inf).astype(np.float64)


def norm_bounds(plan: Plan, tensors: Mapping[str, TensorInfo], magnitudes: Array) -> tuple[float, ...]:
    """For each module, from the largest magnitudes of all its matrices, A before B; see `_bounds`."""
    sizes = _sizes(tensors, plan)
    pairs = _bounds(sizes.scale, magnitudes[0::2] * sizes.a, magnitudes[1::2] * sizes.b)
    return tuple(np.bincount(sizes.module, pairs, len(plan)).tolist())


@dataclass(frozen=True, slots=True)
class _Sizes:
    """Of all pairs of a plan, in float64. A norm is at most the root of a matrix's size times its largest magnitude."""

    scale: Array
    a: Array  # roots
    b: Array
    module: Array  # whose each is, by its place in the plan


@remembered
def _sizes(_: Mapping[str, TensorInfo], plan: Plan) -> _Sizes:
    pairs = [(module.module, pair.part) for module in plan for pair in module.parts]
    return _Sizes(
        scale=np.array([part.scale for _, part in pairs], np.float64),
        a=np.sqrt([float(part.r * shape.experts * shape.in_features) for shape, part in pairs]),
        b=np.sqrt([float(part.r * shape.experts * shape.out_features) for shape, part in pairs]),
        module=np.repeat(np.arange(len(plan)), [len(module.parts) for module in plan]),
    )


def closer_bound(blob: Tensor, module: ModuleShape, entries: Sequence[Entry]) -> float:
    """The same of one module, from its matrices as they are packed. Small ones take as long as loading them did."""
    norms = [
        (
            entry.scale,
            _norm(blob, entry.a_offset, _numel(blob, module, entry, module.in_features), entry.storage),
            _norm(blob, entry.b_offset, _numel(blob, module, entry, module.out_features), entry.storage),
        )
        for entry in entries
    ]
    return float(_bounds(*np.array(norms, np.float64).T).sum())


def _numel(blob: Tensor, module: ModuleShape, entry: Entry, features: int) -> int:
    """Of a matrix; of all experts' with the zeros between them."""
    if module.experts == 1:
        return entry.r * features
    share = 1 if entry.storage == Storage.NATIVE else blob.element_size() // 2
    return module.experts * share * room_numel(entry.r * features, share)


def _bounds(scale: Array, a: Array, b: Array) -> Array:
    """|scale| |A| |B|, 0 only if one of them is; infinite if float32 does not hold the squares that a norm is made of.

    Also of blocks: each part of A meets one part of B, and a sum of products is not above the product of sums.
    """
    scale = np.abs(scale)
    with np.errstate(over="ignore", invalid="ignore"):
        found = np.maximum(scale * a * b * MARGIN, sys.float_info.min)
        found[np.maximum(a, scale * b) > LARGEST] = np.inf
    found[(scale == 0) | (a == 0) | (b == 0)] = 0.0
    return found


def _norm(blob: Tensor, offset: int, numel: int, storage: Storage) -> float:
    """Of one matrix, or a little more. Its panels change the order of its elements only."""
    dtype = KEPT.get(storage) or DTYPES[blob.dtype]
    if dtype == "F32":
        values = blob.numpy()[offset : offset + numel]
    else:
        values = blob[offset:].view(torch.int16).numpy().view(np.uint16)[:numel]
    return math.sqrt(sum_of_squares(values, dtype) * SQUARES_MARGIN + numel * SQUARE_LOST)


def sum_of_squares(values: Array, dtype: str) -> float:
    """Of flat values that are finite, up to rounding and at most a hundredth more. 16 bits come as bits."""
    with np.errstate(over="ignore"):
        return sum(_dot(piece) for piece in _widened(values, dtype))


def _dot(values: Array) -> float:
    whole = len(values) - len(values) % ROW
    rows, rest = values[:whole].reshape(-1, ROW), values[whole:]
    return sum(np.vecdot(rows, rows).tolist(), float(np.dot(rest, rest)))


def _widened(values: Array, dtype: str) -> Iterator[Array]:
    """Numbers of the same magnitudes, or larger by less than a hundredth, that numpy multiplies fast."""
    widen = {"BF16": _wide_bfloat16, "F16": _wide_float16}.get(dtype)
    if widen is None:
        yield values
        return
    even = len(values) - len(values) % 2
    for start in range(0, even, PIECE):
        yield from widen(values[start : min(start + PIECE, even)].view(np.uint32))
    yield from widen(values[even:].astype(np.uint32))


def _wide_bfloat16(pairs: Array) -> Iterator[Array]:
    yield pairs.view(np.float32)  # one of the two; the other's bits are the end of its mantissa, less than 2^-7 of it
    yield (pairs << np.uint32(16)).view(np.float32)


def _wide_float16(pairs: Array) -> Iterator[Array]:
    """Without signs, float32 has the same bits 13 further up, and counts exponents from a number that is 112 higher."""
    for lower in (pairs, pairs >> np.uint32(16)):
        wide = ((lower & np.uint32(0x7FFF)) << np.uint32(13)).view(np.float32)
        wide *= np.float32(2.0**112)
        yield wide
