"""A captured graph computes what it was captured for; any step that needs more is refused, with both numbers."""

from __future__ import annotations

import pytest
from support.kernel_cases import make_case

from gralora_kernels.replay import ReplayError, ReplayGuard
from gralora_kernels.work import Blocking, plan_work

BLOCKING = Blocking(small_tile=2, full_tile=4, rank_rows=4, columns=16)
# Slot:                       0          1         2         3        4     5
CASE = make_case(96, [96], [[(8, 2)], [(4, 1)], [(2, 2), (2, 1)], [(8, 8)], [], [(64, 4)]])


def step(*slots, groups=1):
    return plan_work([CASE.group] * groups, CASE.grouping(slots), BLOCKING)


@pytest.mark.parametrize("slots", [(0, 0, 1, 2), (1, 1, 0), (0, -1), (4, 4), (-1, -1, -1, -1)], ids=str)
def test_a_step_that_fits_passes(slots):
    ReplayGuard(step(0, 0, 1, 2)).check(step(*slots))


@pytest.mark.parametrize(
    ("captured", "slots", "message"),
    [
        pytest.param((0, 1), (0, 1, 1), "needs tokens 3, but the graph was captured with 2", id="tokens"),
        pytest.param((0, 1, -1), (0, 1, 1), "needs adapted tokens 3, .* captured with 2", id="adapted"),
        pytest.param((0, 0, 1), (1, 1, 1), "needs tokens per tile 4, .* captured with 2", id="tile"),
        pytest.param((1, 1), (0, 1), "needs columns of u 16, .* captured with 4", id="width"),
        pytest.param((0, 0), (0, 1), "needs items in all lists 17, .* captured with 10", id="items"),
    ],
)
def test_a_step_that_does_not_fit_is_refused(captured, slots, message):
    with pytest.raises(ReplayError, match=message):
        ReplayGuard(step(*captured)).check(step(*slots))


def test_widths_that_break_the_captured_alignment_are_refused():
    """The kernels promised the compiler blocks of 24 elements; those of 96 / 8 = 12 would be read misaligned."""
    with pytest.raises(ReplayError, match=r"an alignment of input blocks in group 0 of 4, but .* with 8"):
        ReplayGuard(step(5)).check(step(3))


def test_another_number_of_groups_is_refused():
    with pytest.raises(ReplayError, match=r"groups 2, .* 1") as caught:
        ReplayGuard(step(0)).check(step(0, groups=2))

    assert (caught.value.needed, caught.value.captured) == (2, 1)
