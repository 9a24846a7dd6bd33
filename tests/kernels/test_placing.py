"""Many matrices that are placed in one compiled call lie where numpy puts them, one by one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gralora_kernels.cpu.backend import CpuBackend
from gralora_kernels.cpu.placing import place_panels
from gralora_kernels.packing import Place, place_a

PANEL = CpuBackend.packing.panel
BLOCK = st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 2 * PANEL + 3), st.booleans())
NONE = 0xAB  # each byte of memory that belongs to no matrix


def place(*, source: int, target: int, blocks: int, depth: int, columns: int, is_transposed: bool = False) -> list[int]:
    row = dict(zip(Place, (source, target, blocks, depth, columns, int(is_transposed)), strict=True))
    return [row[column] for column in Place]


@settings(deadline=None)
@given(
    kinds=st.lists(BLOCK, min_size=1, max_size=5),
    bits=st.sampled_from([np.uint16, np.uint32]),
    gap=st.integers(0, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_matrix_lies_where_numpy_puts_it_and_nothing_else_is_touched(
    kinds: list[tuple[int, int, int, bool]], bits: Any, gap: int, seed: int
) -> None:
    kinds = [(1 if is_transposed else k, depth, columns, is_transposed) for k, depth, columns, is_transposed in kinds]
    sizes = [k * depth * columns for k, depth, columns, _ in kinds]
    values = np.random.default_rng(seed).integers(0, np.iinfo(bits).max, sum(sizes), bits, endpoint=True)
    expected = np.full(2 * (sum(sizes) + gap * len(kinds)), NONE, np.uint8).repeat(bits().itemsize // 2).view(bits)
    out, table, magnitudes = expected.copy(), [], []
    source, target = 0, 0
    for (k, depth, columns, is_transposed), size in zip(kinds, sizes, strict=True):
        own = values[source : source + size]
        blocks = own.reshape(columns, depth).T[np.newaxis] if is_transposed else own.reshape(k, depth, columns)
        place_a(expected[target : target + size], blocks, PANEL)
        magnitudes.append((own & (np.iinfo(bits).max >> 1)).max())
        table.append(
            place(source=source, target=target, blocks=k, depth=depth, columns=columns, is_transposed=is_transposed)
        )
        source, target = source + size, target + size + gap

    found = place_panels(out, values, np.array(table))

    assert np.array_equal(expected, out)
    assert found.tolist() == magnitudes


def test_values_that_begin_at_an_odd_byte_are_placed_all_the_same() -> None:
    data = np.arange(2 * 40 + 1, dtype=np.uint8)
    out = np.zeros(40, np.uint16)

    place_panels(out, data[1:].view(np.uint16), np.array([place(source=0, target=0, blocks=1, depth=4, columns=10)]))

    assert np.array_equal(out.view(np.uint8), data[1:])


@pytest.mark.parametrize(
    "outside",
    [
        place(source=-1, target=0, blocks=1, depth=1, columns=1),
        place(source=0, target=-1, blocks=1, depth=1, columns=1),
        place(source=7, target=0, blocks=1, depth=2, columns=2),
        place(source=0, target=9, blocks=1, depth=2, columns=2),
        place(source=0, target=0, blocks=-1, depth=2, columns=2),
    ],
    ids=str,
)
def test_a_place_outside_of_its_memory_is_refused_before_anything_is_moved(outside: list[int]) -> None:
    out = np.zeros(12, np.uint16)

    with pytest.raises(AssertionError):
        place_panels(out, np.ones(10, np.uint16), np.array([outside]))

    assert not out.any()
