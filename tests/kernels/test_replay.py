"""A captured graph computes what it was captured for; any step that needs more is refused, with both numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.kernel_cases import make_case

from gralora_kernels.listing import ListPlanner
from gralora_kernels.replay import ReplayError, ReplayGuard
from gralora_kernels.work import Blocking

BLOCKING = Blocking(
    small_tile=2, full_tile=4, rank_rows=4, columns=16, narrow_columns=8, narrow_tokens=4, depth=64, split_tokens=8,
)  # fmt: skip
# Slot:                       0          1         2         3        4     5
CASE = make_case(96, [96], [[(8, 2)], [(4, 1)], [(2, 2), (2, 1)], [(8, 8)], [], [(64, 4)]])
GUARD = ReplayGuard(
    tokens=4, columns=16, items=70, tile_tokens=2, is_split=True, in_alignments=(8,), out_alignments=(8,)
)


def step(*slots, groups=1):
    return ListPlanner([CASE.group] * groups, BLOCKING).plan(CASE.grouping(slots))


@pytest.mark.parametrize("slots", [(0, 0, 1, 2), (1, 1, 0), (1, 1, 1), (0, -1), (4, 4), (-1, -1, -1, -1)], ids=str)
def test_a_step_that_fits_passes(slots):
    GUARD.check(step(*slots))


@pytest.mark.parametrize(
    ("slots", "captured", "message"),
    [
        pytest.param((0, 1, 1, -1, -1), {}, "needs tokens 5, but the graph was captured with 4", id="tokens"),
        pytest.param((1, 1, 1), {"tile_tokens": 1}, "needs tokens per tile 2, .* captured with 1", id="tile"),
        pytest.param((5,), {}, "needs columns of u 256, .* captured with 16", id="width"),
        pytest.param((0, 1, 2), {"items": 20}, "needs items in all lists 46, .* captured with 20", id="items"),
        pytest.param((0, 1), {"is_split": False}, "needs split sums 1, .* captured with 0", id="split"),
    ],
)
def test_a_step_that_does_not_fit_is_refused(slots, captured, message):
    with pytest.raises(ReplayError, match=message):
        replace(GUARD, **captured).check(step(*slots))


def test_widths_that_break_the_captured_alignment_are_refused():
    """The kernels promised the compiler blocks of 24 elements; those of 96 / 8 = 12 would be read misaligned."""
    with pytest.raises(ReplayError, match=r"an alignment of input blocks in group 0 of 4, but .* with 8"):
        replace(GUARD, columns=64).check(step(3))


def test_another_number_of_groups_is_refused():
    with pytest.raises(ReplayError, match=r"groups 2, .* 1") as caught:
        GUARD.check(step(0, groups=2))

    assert (caught.value.needed, caught.value.captured) == (2, 1)
