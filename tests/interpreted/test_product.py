"""The linear layer with one order of summation: right for any widths, and the same for a token whoever is beside it."""

from __future__ import annotations

import pytest
import torch
from support.numeric import assert_close
from torch.nn.functional import linear as twin

from gralora_kernels.triton_ops.product import linear

DTYPES = [torch.float32, torch.float16]  # the interpreter cannot multiply bf16
# tokens, in, out: one row; whole tiles; one row more than a tile; odd widths, wider than a round of the loop.
SHAPES = [(1, 32, 16), (16, 128, 64), (17, 200, 100), (33, 100, 65), (5, 333, 7), (40, 256, 130)]


def make_case(tokens, in_features, out_features, dtype=torch.float32):
    """x, weight, bias and the middle of a poisoned buffer."""
    generator = torch.Generator().manual_seed(0)
    shapes = (tokens, in_features), (out_features, in_features), (out_features,)
    x, weight, bias = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    buffer = torch.empty(tokens + 2, out_features, dtype=dtype)
    return x, weight, bias, buffer


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("has_bias", [False, True], ids=["", "bias"])
def test_the_product_is_torchs_and_stays_within_its_rows(shape, has_bias, dtype):
    x, weight, bias, buffer = make_case(*shape, dtype)
    bias = bias if has_bias else None

    linear(buffer[1:-1], x, weight, bias)

    expected = twin(x.float(), weight.float(), None if bias is None else bias.float())
    assert_close(expected, buffer[1:-1])
    assert buffer[[0, -1]].isnan().all()


@pytest.mark.parametrize(("tokens", "row"), [(16, 5), (17, 16), (40, 33)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_is_the_same_alone_and_in_a_batch(tokens, row, dtype):
    x, weight, bias, buffer = make_case(tokens, 200, 70, dtype)
    out, alone = buffer[1:-1], torch.empty(1, 70, dtype=dtype)

    linear(out, x, weight, bias)
    linear(alone, x[row : row + 1].clone(), weight, bias)

    assert torch.equal(out[row], alone[0])


def test_a_rows_neighbours_may_be_anything():
    x, weight, bias, buffer = make_case(16, 64, 32)
    expected, out = torch.empty(1, 32), buffer[1:-1]
    linear(expected, x[:1].clone(), weight, bias)
    x[1:] = torch.nan

    linear(out, x, weight, bias)

    assert torch.equal(expected[0], out[0])
