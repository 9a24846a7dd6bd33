"""The sum of adapters as one blob: what it computes, in how few pairs, and what names it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import MODULES, write_gralora, write_lora

from gralora_kernels.cpu.backend import CpuBackend
from gralora_kernels.packing import ROW_MAJOR, Packing, blocks_a, blocks_b
from gralora_kernels.tables import ENTRIES, Storage
from gralora_runtime.adapters.checkpoint import loader
from gralora_runtime.adapters.checkpoint.loader import LoadedAdapter
from gralora_runtime.adapters.checkpoint.mixture import Ingredient, mixed, mixture_digest
from gralora_runtime.adapters.checkpoint.spec import ModuleShape
from gralora_runtime.adapters.checkpoint.tensors import WEIGHTS_FILE
from gralora_runtime.adapters.checkpoint.update import LowRank, dense
from gralora_runtime.errors import AdapterRejectedError

Write = Callable[[Path], Path]


def _in_16_bits(write: Write, dtype: torch.dtype, folder: Path) -> Path:
    write(folder)
    tensors = load_file(folder / WEIGHTS_FILE)
    save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, folder / WEIGHTS_FILE)
    return folder


LORA = partial(write_lora, r=4, seed=1)
OTHER_LORA = partial(write_lora, r=8, seed=2, lora_alpha=4)
HYBRID = partial(write_gralora, r=8, k=2, hybrid_r=4, seed=3)
FOUR = partial(write_gralora, r=8, k=4, seed=4)
OTHER_FOUR = partial(write_gralora, r=4, k=4, seed=5)
EIGHT = partial(write_gralora, r=16, k=8, seed=6)
HALVES = partial(_in_16_bits, partial(write_lora, r=4, seed=7), torch.float16)
BRAINS = partial(_in_16_bits, partial(write_gralora, r=8, k=2, seed=8), torch.bfloat16)


def load(folder: Path, packing: Packing, dtype: torch.dtype = torch.float32) -> LoadedAdapter:
    return loader.load(folder.name, folder, MODULES, dtype, max_width=256, packing=packing)


def ingredients(root: Path, parts: Sequence[tuple[Write, float]], packing: Packing, **options: Any) -> list[Ingredient]:
    return [
        Ingredient(load(write(root / str(at)), packing, **options), weight) for at, (write, weight) in enumerate(parts)
    ]


def pairs_of(adapter: LoadedAdapter, module: ModuleShape, packing: Packing) -> list[LowRank]:
    """What the kernels would multiply, in float32."""
    found = []
    for entry in dict(adapter.layout.modules).get(module.name, ()):
        kinds = {Storage.FLOAT16: torch.float16, Storage.BFLOAT16: torch.bfloat16}
        dtype = kinds.get(entry.storage, adapter.blob.dtype)

        def elements(offset: int, numel: int, dtype: torch.dtype = dtype) -> Any:
            cells = adapter.blob[offset : offset + -(-numel * dtype.itemsize // adapter.blob.element_size())]
            return cells.view(dtype)[:numel].float().numpy()

        a = blocks_a(elements(entry.a_offset, entry.r * module.in_features), entry.k, entry.r, packing.panel)
        b = blocks_b(elements(entry.b_offset, entry.r * module.out_features), entry.k, entry.r, packing.panel)
        found.append(LowRank(torch.from_numpy(a), torch.from_numpy(b), entry.scale))
    return found


def update(adapter: LoadedAdapter, module: ModuleShape, packing: Packing) -> torch.Tensor:
    pairs = [dense(pair) for pair in pairs_of(adapter, module, packing)]
    return sum(pairs, torch.zeros(module.out_features, module.in_features))


@pytest.mark.parametrize("packing", [ROW_MAJOR, CpuBackend.packing], ids=["row-major", "panels"])
@pytest.mark.parametrize(
    ("parts", "ks"),
    [
        ([(LORA, 0.5)], [1]),
        ([(LORA, 0.7), (OTHER_LORA, -1.25)], [1, 1]),
        ([(HYBRID, 0.5), (LORA, 2.0)], [2, 1]),
        ([(FOUR, 1.0), (OTHER_FOUR, 0.3), (LORA, 0.1)], [4, 1]),
        ([(HYBRID, 0.7), (FOUR, -0.4), (EIGHT, 1.5), (OTHER_LORA, 1.0)], [8, 1]),
        ([(HALVES, 0.7), (BRAINS, 0.2)], [1, 2]),
        ([(HALVES, 0.7), (BRAINS, 0.2), (HALVES, 0.1), (OTHER_LORA, -3.0)], [2, 1]),
    ],
)
def test_the_sum_is_that_of_the_weighted_updates(
    tmp_path: Path, parts: Sequence[tuple[Write, float]], ks: Sequence[int], packing: Packing
) -> None:
    of = ingredients(tmp_path, parts, packing)
    made = mixed("m", of, MODULES, packing=packing, max_width=512)

    for module in MODULES:
        expected = sum(one.weight * update(one.adapter, module, packing) for one in of)
        assert isinstance(expected, torch.Tensor)
        torch.testing.assert_close(update(made, module, packing), expected, rtol=1e-5, atol=1e-5)
        assert sorted(pair.k for pair in pairs_of(made, module, packing)) == sorted(ks)
    assert len(ks) <= ENTRIES
    assert made.layout.width == max(
        sum(pair.k * pair.a.shape[2] for one in of for pair in pairs_of(one.adapter, module, packing))
        for module in MODULES
    )


def test_two_pairs_keep_their_bits_and_their_16_bits(tmp_path: Path) -> None:
    packing = CpuBackend.packing
    of = ingredients(tmp_path, [(HALVES, 0.7), (BRAINS, -0.2)], packing)
    made = mixed("m", of, MODULES, packing=packing, max_width=512)

    entries = dict(made.layout.modules)[MODULES[0].name]
    assert {entry.storage for entry in entries} == {Storage.FLOAT16, Storage.BFLOAT16}
    assert made.layout.numel == sum(one.adapter.layout.numel for one in of)


def test_one_recipe_and_one_weight_multiply_nothing(tmp_path: Path) -> None:
    """Three adapters of one recipe at one weight: their elements stay as they are, and the scale is the table's."""
    packing = CpuBackend.packing
    of = ingredients(tmp_path, [(partial(write_lora, r=4, seed=seed), 0.3) for seed in range(3)], packing)
    made = mixed("m", of, MODULES, packing=packing, max_width=512)

    (entry,) = dict(made.layout.modules)[MODULES[0].name]
    assert (entry.r, entry.scale) == (12, 4.0 * 0.3)
    (pair,) = pairs_of(made, MODULES[0], packing)
    parts = [part for one in of for part in pairs_of(one.adapter, MODULES[0], packing)]
    assert {tuple(column.tolist()) for column in pair.a[0].T} == {
        tuple(column.tolist()) for part in parts for column in part.a[0].T
    }


def test_a_pool_of_16_bits_holds_the_sum_rounded_once(tmp_path: Path) -> None:
    parts = [(HYBRID, 0.7), (FOUR, -0.4), (OTHER_LORA, 1.0)]
    of = ingredients(tmp_path, parts, ROW_MAJOR, dtype=torch.bfloat16)
    made = mixed("m", of, MODULES, packing=ROW_MAJOR, max_width=512)

    assert made.blob.dtype == torch.bfloat16
    for module in MODULES:
        expected = sum(one.weight * update(one.adapter, module, ROW_MAJOR) for one in of)
        assert isinstance(expected, torch.Tensor)
        error = (update(made, module, ROW_MAJOR) - expected).norm() / expected.norm()
        assert error < 2**-8


def test_modules_that_only_some_have_are_there(tmp_path: Path) -> None:
    one = load(
        write_lora(tmp_path / "a", MODULES[:1], r=4, target_modules=["q_proj"], layers_to_transform=[0]), ROW_MAJOR
    )
    two = load(write_gralora(tmp_path / "b", r=8, k=2), ROW_MAJOR)
    made = mixed("m", [Ingredient(two, 0.5), Ingredient(one, 2.0)], MODULES, packing=ROW_MAJOR, max_width=512)

    counts = {name: len(entries) for name, entries in made.layout.modules}
    assert counts == {module.name: 2 if module is MODULES[0] else 1 for module in MODULES}


def test_its_digest_is_that_of_contents_and_weights_in_any_order(tmp_path: Path) -> None:
    a, b = ingredients(tmp_path, [(LORA, 0.5), (FOUR, 0.25)], ROW_MAJOR)
    made, other = (mixed("m", of, MODULES, packing=ROW_MAJOR, max_width=512) for of in ([a, b], [b, a]))

    assert made.digest == other.digest == mixture_digest([(b.adapter.digest, 0.25), (a.adapter.digest, 0.5)])
    assert torch.equal(made.blob, other.blob)
    others = [
        [(a.adapter.digest, 0.25), (b.adapter.digest, 0.5)],
        [(a.adapter.digest, 0.5), (b.adapter.digest, 0.25000003)],
        [(a.adapter.digest, 0.5)],
        [(a.adapter.digest, 0.5), (b.adapter.digest, 0.25), (b.adapter.digest, 0.25)],
    ]
    assert len({made.digest, a.adapter.digest, *map(mixture_digest, others)}) == 2 + len(others)


def test_more_ranks_than_the_server_takes_are_refused(tmp_path: Path) -> None:
    of = ingredients(tmp_path, [(FOUR, 1.0), (EIGHT, 1.0)], ROW_MAJOR)

    with pytest.raises(AdapterRejectedError, match=r"'m' cannot be served: .* are 160 together, .* at most 128"):
        mixed("m", of, MODULES, packing=ROW_MAJOR, max_width=128)
