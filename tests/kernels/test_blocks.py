"""Weights in GGUF's blocks: recognised number for number, kept in their bits, and multiplied as if they were fp32."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize
from numba import njit

from gralora_kernels.cpu.blocks import BLOCKS_4, BLOCKS_8, PAIR, recognised
from gralora_kernels.cpu.linear import (
    FEW_ROWS,
    ROW_BLOCK,
    ROW_BLOCK_OF_BLOCKS,
    WIDE_BYTES,
    PackedWeight,
    linear,
    linear_piece,
    num_pieces,
    row_numbers,
)
from gralora_kernels.cpu.microkernel import FROM_OUTPUT, FROM_ZERO, PANEL
from gralora_kernels.cpu.simd import LANES
from gralora_kernels.tables import Storage

KINDS = {Kind.Q4_0: BLOCKS_4, Kind.Q4_1: BLOCKS_4, Kind.Q8_0: BLOCKS_8}
BITS = {BLOCKS_4: 5, BLOCKS_8: 8.5}  # of a number, its share of a scale and an offset included


def widened(kind: Kind, out_features: int, in_features: int, seed: int = 0) -> torch.Tensor:
    """fp32, as GGUF's own library widens what it made of random numbers; some blocks are all alike, or zero."""
    random = np.random.default_rng(seed)
    values = random.normal(size=(out_features, in_features)).astype(np.float32) * 0.05
    values[out_features // 2, :32] = 0.0
    values[out_features // 3, :32] = 0.25
    return torch.from_numpy(dequantize(quantize(values, kind), kind).copy())


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize(
    ("in_features", "out_features"), [(576, 192), (192, 577), (32, 3), (1536, 40), (64, 3 * PANEL)]
)
def test_blocks_are_kept_as_they_are_and_their_products_are_those_of_fp32(kind, in_features, out_features):
    weight = widened(kind, out_features, in_features)
    small, large = PackedWeight(weight, least_bits=4), PackedWeight(weight)
    columns = -(-out_features // PAIR) * PAIR
    assert (small.storage, large.storage) == (KINDS[kind], Storage.NATIVE)
    assert small.panels.nbytes * 8 == columns * in_features * BITS[small.storage]

    for rows in (*range(1, 18), 31, 130, 3 * ROW_BLOCK, ROW_BLOCK_OF_BLOCKS + 1):
        x = torch.randn(rows, in_features)
        bias = torch.randn(out_features)
        narrow, wide = (torch.empty(rows, out_features) for _ in range(2))
        linear(narrow, x, small, bias)
        linear(wide, x, large, bias)
        assert torch.equal(narrow, wide), f"{rows} rows"


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("columns", [1, LANES + 1, PANEL, PANEL + LANES, PAIR - 1, PAIR, PAIR + 3, 3 * PANEL, 3 * PAIR])
@pytest.mark.parametrize("begin", ["zero", "bias", "y"])
@pytest.mark.parametrize("rows", [1, 2, 7, FEW_ROWS + 1])
def test_rows_are_those_of_fp32_however_much_of_the_last_pair_there_is(kind, columns, begin, rows):
    """Wherever their sums begin; and nothing behind their columns is touched."""
    weight, x = widened(kind, columns, 96), torch.randn(rows, 96)
    first = torch.randn(rows * columns + PAIR)
    found = []
    for packed in (PackedWeight(weight, least_bits=4), PackedWeight(weight)):
        out = first.clone()
        start = {"zero": FROM_ZERO, "bias": first.data_ptr(), "y": FROM_OUTPUT}[begin]
        scratch = torch.empty(WIDE_BYTES, dtype=torch.uint8)
        product(rows, x.data_ptr(), 96, out.data_ptr(), columns, packed.address, int(packed.storage), start,
                scratch.data_ptr(), row_numbers(1))  # fmt: skip
        found.append(out)

    assert torch.equal(*found)
    assert torch.equal(found[0][rows * columns :], first[rows * columns :])
    assert not torch.equal(found[0][: rows * columns], first[: rows * columns])


@njit
def product(rows, x, in_features, out, out_features, panels, storage, start, scratch, iota):
    for piece in range(num_pieces(rows, out_features, storage)):
        linear_piece(piece, rows, x, in_features, out, out_features, panels, storage, start, scratch, iota)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("place", [(0, 0), (39, 95)])
def test_one_number_that_is_of_no_block_keeps_all_in_fp32(kind, place):
    weight = widened(kind, 40, 96)
    weight[place] = torch.nextafter(weight[place], torch.tensor(9.0))

    assert recognised(weight) is None
    assert PackedWeight(weight, least_bits=4).storage == Storage.NATIVE


@pytest.mark.parametrize("weight", [torch.randn(40, 96), widened(Kind.Q8_0, 40, 96)[:, :95], torch.full((4, 32), 1e9)])
def test_what_is_of_no_form_is_not_taken_for_one(weight):
    assert recognised(weight) is None


def test_two_kinds_in_one_weight_are_of_no_form():
    assert recognised(torch.cat([widened(Kind.Q4_1, 40, 96), widened(Kind.Q8_0, 40, 96)])) is None


def test_numbers_that_are_none_are_of_no_form():
    weight = widened(Kind.Q4_1, 40, 96)
    weight[3, 5] = float("nan")

    assert recognised(weight) is None
