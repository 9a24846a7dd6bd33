"""What the CPU does to one row, against its short twin: rows of any width, of which a part fills no vector."""

from __future__ import annotations

import pytest
import torch
from support.numeric import assert_close

from gralora_kernels.cpu import rows
from gralora_kernels.reference import rows as twin

EPS = 1e-5
WIDTHS = [1, 7, 64, 100]


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("width", WIDTHS)
def test_layer_norm(width, has_bias):
    """Far from 0, where a sum of squares would lose what a variance is made of; also in place."""
    x, weight, bias = torch.randn(width) + 5, torch.randn(width), torch.randn(width)
    out = torch.full_like(x, float("nan"))
    expected = twin.norm(x, weight, EPS, bias=bias if has_bias else None, centres=True)
    addresses = weight.data_ptr(), bias.data_ptr() if has_bias else 0

    rows.layer_norm(x.data_ptr(), *addresses, out.data_ptr(), width, EPS)
    rows.layer_norm(x.data_ptr(), *addresses, x.data_ptr(), width, EPS)

    assert_close(expected, out)
    assert torch.equal(out, x)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(
    ("kind", "number"),
    [("silu", rows.SILU), ("gelu_tanh", rows.GELU_TANH), ("squared_relu", rows.SQUARED_RELU)],
)
@pytest.mark.parametrize("gated", [True, False])
def test_activations(gated, kind, number, width):
    x, out, expected = torch.randn((1 + gated) * width), torch.full((width,), float("nan")), torch.empty(1, width)
    twin.activate(expected, x[None], kind, gated=gated)
    ups = x[width:].data_ptr() if gated else 0

    rows.gate(x.data_ptr(), ups, out.data_ptr(), width, number)

    assert_close(expected[0], out)


@pytest.mark.parametrize(("rotate", "neighbours"), [(rows.rotate, False), (rows.rotate_neighbours, True)])
@pytest.mark.parametrize("rotary_dim", [2, 6, 20, 32])
def test_rotations(rotary_dim, rotate, neighbours):
    head, angles = torch.randn(40), torch.randn(1, rotary_dim // 2).repeat(1, 2)
    cos, sin, qkv = angles.cos(), angles.sin(), head.repeat(3)[None]
    pages = torch.zeros(2, 1, 1, 1, 40)
    position = torch.zeros(1, dtype=torch.int64)
    twin.rotate_and_store(
        qkv, *pages, position, position, cos=cos, sin=sin, heads=1, kv_heads=1, head_dim=40, q_norm=None, k_norm=None,
        eps=EPS, neighbours=neighbours,
    )  # fmt: skip

    rotate(head.data_ptr(), cos.data_ptr(), sin.data_ptr(), rotary_dim)

    assert_close(qkv[0, :40], head)
