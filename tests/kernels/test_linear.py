"""The base product against torch, in whatever pieces it is computed."""

from __future__ import annotations

import pytest
import torch
from support.numeric import assert_close

from gralora_kernels.cpu.linear import PackedWeight, linear, storage_of
from gralora_kernels.tables import Storage


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("in_features", "out_features"), [(576, 192), (192, 577), (7, 3), (40, 1), (1500, 33)])
def test_what_16_bits_hold_is_kept_so_and_its_products_are_those_of_fp32(dtype, in_features, out_features):
    """Also of numbers that are below what is normal in 16 bits."""
    weight = torch.randn(out_features, in_features) * torch.logspace(-9, 1, in_features)
    weight = weight.to(dtype).float()
    small, large = PackedWeight(weight), PackedWeight(weight, least_bits=32)
    assert (small.panels.dtype, large.panels.dtype) == (dtype, torch.float32)

    for rows in (1, 2, 3, 5, 8, 13, 31, 130):
        x = torch.randn(rows, in_features)
        narrow, wide = (torch.empty(rows, out_features) for _ in range(2))
        linear(narrow, x, small, None)
        linear(wide, x, large, None)
        assert torch.equal(narrow, wide), f"{rows} rows"


@pytest.mark.parametrize("place", [(0, 0), (39, 95)])
def test_one_number_that_16_bits_do_not_hold_keeps_all_in_fp32(place):
    weight = torch.randn(40, 96).bfloat16().float()
    weight[place] = 1 / 3

    assert storage_of(weight) is Storage.NATIVE
    assert PackedWeight(weight).panels.dtype is torch.float32


def test_shapes_that_do_not_fit_are_refused():
    weight = PackedWeight(torch.zeros(4, 4))
    with pytest.raises(ValueError, match="do not fit a weight"):
        linear(torch.empty(2, 5), torch.zeros(2, 4), weight, None)
    with pytest.raises(ValueError, match="contiguous float32"):
        linear(torch.empty(2, 4), torch.zeros(4, 2).T, weight, None)
