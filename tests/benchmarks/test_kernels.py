"""The benchmark of the kernel alone: what it lays out, and that it times nothing that is wrong."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from benchmarks.gate import GateRedError
from benchmarks.kernels import KernelStep, lay_out
from gralora_kernels.tables import GroupTable

CPU = torch.device("cpu")
SHAPES = [(48, (32, 16)), (32, (48,))]


def test_adapters_lie_one_behind_the_other_all_a_before_all_b():
    groups = [GroupTable(in_features, outs, 2, CPU) for in_features, outs in SHAPES]

    size = lay_out(groups, 2, r=4, k=2)

    tables = [table for group in groups for table in group.modules]
    places = [
        (int(table.host_index[slot, 0, matrix]), 4 * (table.out_features if matrix else table.in_features))
        for slot in range(2)
        for matrix in range(2)
        for table in tables
    ]
    assert all(begin + numel <= following for (begin, numel), (following, _) in pairwise(places))
    assert places[-1][0] + places[-1][1] <= size


@pytest.mark.parametrize("slots", [[0, 1, 2], [1] * 20], ids=["single tokens", "a segment"])
def test_both_ways_are_timed(slots):
    times = KernelStep(SHAPES, num_adapters=3, rank=4, k=2).times_s(slots, samples=3)

    assert list(times) == ["one program", "2 calls"]
    assert all(len(samples_s) == 3 and min(samples_s) > 0 for samples_s in times.values())


@pytest.mark.parametrize("way", ["_one_program", "_calls"])
def test_nothing_is_timed_if_one_of_them_is_wrong(monkeypatch, way):
    monkeypatch.setattr(KernelStep, way, lambda self, slots: lambda: None)

    with pytest.raises(GateRedError, match="do not give what they give in calls"):
        KernelStep(SHAPES, num_adapters=2, rank=4, k=2).times_s([0, 1], samples=1)
