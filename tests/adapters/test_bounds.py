"""A bound of an update's norm is never below the norm, whatever values, dtypes and pools there are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.checkpoints import MODULES, edit_tensors, write_gralora, write_lora

from gralora_kernels.packing import ROW_MAJOR, Packing
from gralora_runtime.adapters.checkpoint import loader
from gralora_runtime.adapters.checkpoint.bounds import closer_bound, largest_magnitude, sum_of_squares
from gralora_runtime.adapters.checkpoint.loader import LoadedAdapter
from gralora_runtime.adapters.checkpoint.update import norm
from gralora_runtime.adapters.checkpoint.whole import read_whole

NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
POOLS = [
    (torch.float32, ROW_MAJOR),
    (torch.float32, Packing(panel=4, keeps_16_bit=True)),
    (torch.bfloat16, ROW_MAJOR),
    (torch.float16, ROW_MAJOR),
]
DTYPES = st.sampled_from(list(NAMES))
SIZES = st.floats(-1e4, 1e4, width=16) | st.sampled_from([0.0, -0.0, 2.0**-24, -(2.0**-14), 65504.0])


def flat(values: list[float] | torch.Tensor, dtype: torch.dtype) -> np.ndarray[Any, Any]:
    """As the loader has them."""
    tensor = torch.as_tensor(values, dtype=torch.float64).to(dtype)
    return tensor.view(torch.int16).numpy().view(np.uint16) if dtype.itemsize == 2 else tensor.numpy()


def loaded(path: Path, dtype: torch.dtype = torch.float32, packing: Packing = ROW_MAJOR) -> LoadedAdapter:
    return loader.load("x", path, MODULES, dtype, max_width=256, packing=packing)


def bounds_of(adapter: LoadedAdapter) -> dict[str, float]:
    return {name: bound for (name, _), bound in zip(adapter.layout.modules, adapter.bounds, strict=True)}


def closer_bounds_of(adapter: LoadedAdapter) -> dict[str, float]:
    entries = dict(adapter.layout.modules)
    return {module.name: closer_bound(adapter.blob, module, entries[module.name]) for module in MODULES}


@given(st.lists(SIZES, max_size=40), DTYPES)
def test_the_largest_magnitude_is_that_of_the_values(values: list[float], dtype: torch.dtype) -> None:
    stored = torch.tensor(values, dtype=torch.float64).to(dtype)

    assert largest_magnitude(flat(values, dtype), NAMES[dtype]) == max(stored.double().abs().tolist(), default=0.0)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan, -torch.nan], ids=str)
@pytest.mark.parametrize("dtype", list(NAMES), ids=str)
def test_what_is_no_number_is_infinite(dtype: torch.dtype, value: float) -> None:
    assert largest_magnitude(flat([1.0, value, -2.0], dtype), NAMES[dtype]) == float("inf")


@given(st.lists(SIZES, max_size=40), DTYPES)
def test_squares_are_summed_up_with_at_most_a_hundredth_on_top(values: list[float], dtype: torch.dtype) -> None:
    exact = float(torch.tensor(values, dtype=torch.float64).to(dtype).double().square().sum())
    # What float32 has no square of, is lost.
    assert exact * (1 - 1e-6) - 1e-37 <= sum_of_squares(flat(values, dtype), NAMES[dtype]) <= exact * 1.02 + 1e-37


@pytest.mark.parametrize("numel", [8191, 8192, 65_537, 200_003])
@pytest.mark.parametrize("dtype", list(NAMES), ids=str)
def test_no_element_of_a_long_tensor_is_left_out_or_counted_twice(dtype: torch.dtype, numel: int) -> None:
    values = torch.randn(numel, generator=torch.Generator().manual_seed(numel)).to(dtype)
    exact = float(values.double().square().sum())

    assert exact * (1 - 1e-4) <= sum_of_squares(flat(values, dtype), NAMES[dtype]) <= exact * 1.01


def test_squares_that_float32_does_not_hold_are_infinite_and_no_warning() -> None:
    assert sum_of_squares(flat([3e38] * 20_000, torch.float32), "F32") == float("inf")


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    kind=st.sampled_from([(4, 2, 0), (8, 4, 0), (4, 1, 0), (4, 2, 3)]),
    of_a=st.floats(-10, 4),
    of_b=st.floats(-10, 4),
    alpha=st.sampled_from([0, 1e-3, 16, -64]),
    stored=DTYPES,
    pool=st.sampled_from(POOLS),
    filled=st.sampled_from(["at random", "here and there", "evenly"]),  # evenly, a plain pair's norm is |A| |B|
)
def test_no_bound_is_below_the_norm(
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    kind: tuple[int, int, int],
    of_a: float,
    of_b: float,
    alpha: float,
    stored: torch.dtype,
    pool: tuple[torch.dtype, Packing],
    filled: str,
) -> None:
    r, k, hybrid_r = kind
    fill = {
        "at random": lambda tensor: tensor,
        "here and there": lambda tensor: tensor * (torch.rand(tensor.shape, generator=generator) < 0.1),
        "evenly": torch.ones_like,
    }[filled]

    def scaled(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            size = of_a if "_A" in name else of_b
            tensors[name] = (fill(tensor) * 10.0**size).clamp(-6e4, 6e4).to(stored)

    generator = torch.Generator().manual_seed(seed)
    path = tmp_path_factory.mktemp("adapter") / "x"
    edit_tensors(write_gralora(path, r=r, k=k, hybrid_r=hybrid_r, alpha=alpha, seed=seed % 1000), scaled)
    exact = {module: norm(update) for module, update in read_whole(path, MODULES).updates().items()}
    adapter = loaded(path, *pool)

    for bounds in (bounds_of(adapter), closer_bounds_of(adapter)):
        assert bounds.keys() == exact.keys()
        assert all(bounds[module] >= size for module, size in exact.items())
    assert all(size == 0 for module, size in exact.items() if bounds_of(adapter)[module] == 0)


@pytest.mark.parametrize(("dtype", "value"), [(torch.bfloat16, 1.00390624), (torch.float16, 2.9e-8)], ids=str)
def test_what_a_pool_rounds_down_is_within_the_closer_bound(tmp_path: Path, dtype: torch.dtype, value: float) -> None:
    """A plain pair of equal numbers has the norm |A| |B|, and nothing to spare."""

    def even(tensors: dict[str, torch.Tensor]) -> None:
        for tensor in tensors.values():
            tensor.fill_(value)

    path = edit_tensors(write_lora(tmp_path / "x"), even)
    adapter = loaded(path, dtype)
    exact = {module: norm(update) for module, update in read_whole(path, MODULES).updates().items()}

    assert float(torch.tensor(value).to(dtype)) < value
    assert all(closer_bounds_of(adapter)[module] >= size for module, size in exact.items())


def test_the_closer_bound_is_closer_and_not_far_from_the_norm(tmp_path: Path) -> None:
    """A plain pair of rank 4: |A| |B| is at most twice what random ones give."""
    path = write_lora(tmp_path / "x", r=4)
    adapter = loaded(path)
    exact = {module: norm(update) for module, update in read_whole(path, MODULES).updates().items()}

    for module, size in exact.items():
        assert size <= closer_bounds_of(adapter)[module] < min(2.5 * size, bounds_of(adapter)[module])


@pytest.mark.parametrize("zero", [0.0, -0.0], ids=str)
@pytest.mark.parametrize("side", ["_A", "_B"])
@pytest.mark.parametrize("stored", list(NAMES), ids=str)
def test_zeros_of_either_sign_make_a_bound_of_zero(tmp_path: Path, stored: torch.dtype, side: str, zero: float) -> None:
    def zeroed(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            tensors[name] = (torch.full_like(tensor, zero) if side in name else tensor).to(stored)

    adapter = loaded(edit_tensors(write_gralora(tmp_path / "x"), zeroed))

    assert set(adapter.bounds) == {0.0}


def test_the_smallest_number_is_not_zero(tmp_path: Path) -> None:
    def almost_zeroed(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            tensor.zero_().view(-1)[-1] = 1e-45
            assert tensor.count_nonzero() == 1, name

    adapter = loaded(edit_tensors(write_gralora(tmp_path / "x"), almost_zeroed))

    assert min(adapter.bounds) > 0.0


def test_squares_beyond_float32_make_an_infinite_bound(tmp_path: Path) -> None:
    """The rough norm, which tells how many times a weight's it is, then is infinite, too."""

    def lopsided(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            tensor.fill_(1e30 if "_A" in name else 1e-30)

    adapter = loaded(edit_tensors(write_gralora(tmp_path / "x"), lopsided))

    assert set(adapter.bounds) == {float("inf")} == set(closer_bounds_of(adapter).values())
