"""The norms of updates are those of the dense matrices, which are those that the reference kernel computes."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gralora_kernels.reference.adapters import gralora
from gralora_runtime.adapters.checkpoint.update import LowRank, dense, minus, norm, rough_norm

WIDTHS = (24, 48)  # in, out: k = 1, 2, 3, 4, 6, 8, 12 divide both


def pair(k: int, rank: int, scale: float, seed: int) -> LowRank:
    """`rank`: of a block."""
    generator = torch.Generator().manual_seed(seed)
    inputs, outputs = WIDTHS
    a = torch.randn(k, inputs // k, k * rank, generator=generator)
    return LowRank(a, torch.randn(k, k * rank, outputs // k, generator=generator), scale)


def dense_norm(pairs: Sequence[LowRank]) -> float:
    exact = [
        gralora(torch.eye(WIDTHS[0], dtype=torch.float64), one.a.double(), one.b.double(), one.scale) for one in pairs
    ]
    return float(torch.stack(exact).sum(0).norm())


PAIRS = st.builds(
    pair,
    st.sampled_from([1, 2, 3, 4, 8]),
    st.integers(1, 5),
    st.floats(-4, 4, allow_subnormal=False),
    st.integers(0, 9),
)


@pytest.mark.parametrize(("k", "rank"), [(1, 1), (1, 7), (2, 3), (4, 1), (8, 2)])
def test_dense_is_what_the_reference_adds_to_the_identity(k: int, rank: int) -> None:
    one = pair(k, rank, 1.7, seed=1)

    expected = gralora(torch.eye(WIDTHS[0]), one.a, one.b, one.scale).T

    torch.testing.assert_close(dense(one), expected, rtol=1e-6, atol=1e-5)


@settings(deadline=None, max_examples=60)
@given(st.lists(PAIRS, max_size=3))
def test_a_norm_is_that_of_the_dense_sum(pairs: list[LowRank]) -> None:
    expected = dense_norm(pairs) if pairs else 0.0

    assert norm(pairs) == pytest.approx(expected, rel=1e-10, abs=1e-10)


@settings(deadline=None, max_examples=30)
@given(PAIRS)
def test_the_rough_norm_is_near(one: LowRank) -> None:
    assert rough_norm([one]) == pytest.approx(dense_norm([one]), rel=1e-4, abs=1e-6)


def test_what_all_but_cancels_keeps_its_digits() -> None:
    """Squares that are subtracted from each other would leave nothing of a difference of 1e-9."""
    one = pair(4, 2, 1.0, seed=3)
    other = LowRank(one.a, one.b, 1.0 + 1e-9)

    assert norm((other, *minus((one,)))) == pytest.approx(1e-9 * norm((one,)), rel=1e-5)


def test_a_plain_pair_and_the_blocks_that_equal_it_cancel() -> None:
    """A block of k = 2 that has zeros elsewhere is a plain pair with zeros elsewhere."""
    blocks = pair(2, 3, 0.5, seed=4)
    u, s, v = torch.linalg.svd(dense(blocks).double(), full_matrices=False)
    plain = LowRank(v.T[None], (u * s).T[None], 1.0)  # A [1, in, r], B [1, r, out]

    assert norm((blocks, *minus((plain,)))) < 1e-6 * norm((blocks,))


def test_numbers_beyond_float32_make_no_rough_norm() -> None:
    huge = LowRank(torch.full((1, 4, 1), 1e30), torch.full((1, 1, 4), 1e30), 1.0)

    assert not rough_norm([huge]) < float("inf")
    assert norm([huge]) == pytest.approx(4e60)
