"""The base product against torch, in whatever pieces it is computed."""

from __future__ import annotations

import pytest
import torch
from support.numeric import assert_close

from gralora_kernels.cpu.linear import PackedWeight, linear


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 13, 31, 130])
@pytest.mark.parametrize(("in_features", "out_features"), [(576, 192), (192, 577), (7, 3), (40, 1), (2500, 33)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_agrees_with_torch(rows, in_features, out_features, with_bias):
    x, weight = torch.randn(rows, in_features), torch.randn(out_features, in_features)
    bias = torch.randn(out_features) if with_bias else None
    out = torch.empty(rows, out_features)

    linear(out, x, PackedWeight(weight), bias)

    assert_close(torch.nn.functional.linear(x, weight, bias), out)


def test_a_rows_result_does_not_depend_on_its_batch():
    x, weight = torch.randn(131, 1500), PackedWeight(torch.randn(193, 1500))
    together, alone = torch.empty(131, 193), torch.empty(1, 193)
    linear(together, x, weight, None)

    for row in range(131):
        linear(alone, x[row : row + 1], weight, None)
        assert torch.equal(together[row], alone[0])


def test_a_rows_result_does_not_depend_on_how_many_there_are():
    x, weight = torch.randn(34, 96), PackedWeight(torch.randn(40, 96))
    together = torch.empty(34, 40)
    linear(together, x, weight, None)

    for count in range(1, 34):
        few = torch.empty(count, 40)
        linear(few, x[:count], weight, None)
        assert torch.equal(few, together[:count]), f"{count} rows"


def test_shapes_that_do_not_fit_are_refused():
    weight = PackedWeight(torch.zeros(4, 4))
    with pytest.raises(ValueError, match="do not fit a weight"):
        linear(torch.empty(2, 5), torch.zeros(2, 4), weight, None)
    with pytest.raises(ValueError, match="contiguous float32"):
        linear(torch.empty(2, 4), torch.zeros(4, 2).T, weight, None)
