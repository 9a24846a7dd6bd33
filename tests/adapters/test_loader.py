"""Weights in, one packed blob out: exact, finite, and named by its content."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import (
    MODULES,
    edit_config,
    edit_tensors,
    gralora_config,
    gralora_tensors,
    lora_config,
    lora_tensors,
    write_checkpoint,
    write_gralora,
    write_lora,
)

from gralora_kernels.cpu.backend import CpuBackend
from gralora_kernels.packing import Packing
from gralora_kernels.reference.adapters import pack_a, pack_b
from gralora_kernels.tables import DTYPES
from gralora_runtime.adapters.checkpoint import loader
from gralora_runtime.adapters.checkpoint.loader import LoadedAdapter
from gralora_runtime.adapters.checkpoint.spec import ModuleShape
from gralora_runtime.adapters.checkpoint.tensors import WEIGHTS_FILE
from gralora_runtime.errors import AdapterRejectedError

MODULE = MODULES[2]  # 48 -> 32
PREFIX = f"base_model.model.{MODULE.name}"
ODD = ModuleShape("odd.q_proj", 9, 15)  # not a multiple of the alignment
KEEPING = Packing(keeps_16_bit=True)
DTYPE_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def load(path: Path, modules: tuple[ModuleShape, ...] = MODULES, **options: Any) -> LoadedAdapter:
    dtype = options.pop("dtype", torch.float32)
    return loader.load(path.name, path, modules, dtype, **{"max_width": 256, **options})


def rejection(path: Path, **options: Any) -> tuple[str, ...]:
    with pytest.raises(AdapterRejectedError) as caught:
        load(path, **options)
    return caught.value.problems


def matrices(adapter: LoadedAdapter, module: ModuleShape, entry: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    found = dict(adapter.layout.modules)[module.name][entry]
    a = adapter.blob[found.a_offset :][: found.r * module.in_features].view(found.r, -1)
    b = adapter.blob[found.b_offset :][: found.r * module.out_features].view(found.r, -1)
    return a, b


def rewrite(path: Path, *, padding: int = 0) -> Path:
    """The same tensors, the last one first, behind a header that is `padding` bytes longer."""
    file = path / WEIGHTS_FILE
    tensors = dict(reversed(load_file(file).items()))
    entries, data = {}, b""
    for name, tensor in tensors.items():
        end = len(data) + tensor.nbytes
        dtype = DTYPE_NAMES[tensor.dtype]
        entries[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [len(data), end]}
        data += tensor.contiguous().view(torch.uint8).numpy().tobytes()
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8 + padding)
    file.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return path


def test_gralora_is_packed_as_the_kernels_want_it(tmp_path: Path) -> None:
    tensors = gralora_tensors(r=8, k=4, hybrid_r=2)
    adapter = load(write_gralora(tmp_path / "a", r=8, k=4, hybrid_r=2))

    blocks, plain = matrices(adapter, MODULE), matrices(adapter, MODULE, 1)

    assert torch.equal(pack_a(tensors[f"{PREFIX}.gralora_A"]), blocks[0])
    assert torch.equal(pack_b(tensors[f"{PREFIX}.gralora_B"]), blocks[1])
    assert torch.equal(tensors[f"{PREFIX}.gralora_A_general.weight"], plain[0])
    assert torch.equal(tensors[f"{PREFIX}.gralora_B_general.weight"].T, plain[1])
    assert adapter.layout.width == 4 * 8 + 2


def test_every_matrix_is_aligned_and_none_overlaps(tmp_path: Path) -> None:
    modules = (ODD, ModuleShape("odd.v_proj", 21, 3))
    adapter = load(write_gralora(tmp_path / "a", modules, r=3, k=3, hybrid_r=1), modules)

    taken = torch.zeros(adapter.layout.numel)
    for module in modules:
        for entry in dict(adapter.layout.modules)[module.name]:
            assert entry.a_offset % 16 == entry.b_offset % 16 == 0
            taken[entry.a_offset :][: entry.r * module.in_features] += 1
            taken[entry.b_offset :][: entry.r * module.out_features] += 1
    assert taken.max() == 1
    assert sum(tensor.numel() for tensor in gralora_tensors(modules, r=3, k=3, hybrid_r=1).values()) == taken.sum()
    assert not adapter.blob[taken == 0].any()
    assert adapter.layout.numel % 16 == 0
    assert adapter.layout.summary.packed_numel == adapter.layout.numel


@pytest.mark.parametrize("packing", [Packing(), KEEPING, CpuBackend.packing], ids=["rows", "rows of 16 bits", "cpu"])
@pytest.mark.parametrize("stored", [torch.float16, torch.float32], ids=str)
def test_every_byte_of_a_blob_is_a_matrix_s_or_zero(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: torch.dtype, packing: Packing
) -> None:
    """Memory that was given to it holds what somebody else had there."""
    modules = (ODD, ModuleShape("odd.v_proj", 21, 3))
    path = write_gralora(tmp_path / "a", modules, r=3, k=3, hybrid_r=1)
    edit_tensors(path, lambda tensors: tensors.update({name: t.to(stored) for name, t in tensors.items()}))
    blobs = []
    for fill in (0x00, 0xAB):
        monkeypatch.setattr(loader, "np", FilledMemory(fill))
        blobs.append(load(path, modules, packing=packing).blob.view(torch.uint8))

    assert torch.equal(*blobs)
    assert (blobs[0] == 0).any(), "there are no gaps"


class FilledMemory:
    """numpy for one module, whose fresh memory holds one byte everywhere. numpy itself must not change: what Numba
    compiles meanwhile would not know its functions any more, for as long as the process lives."""

    def __init__(self, byte: int) -> None:
        self._byte = byte

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    def empty(self, *args: Any) -> np.ndarray[Any, np.dtype[Any]]:
        array: np.ndarray[Any, np.dtype[Any]] = np.empty(*args)
        array.view(np.uint8).fill(self._byte)
        return array


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_storage_dtypes_load_exactly(tmp_path: Path, stored: torch.dtype) -> None:
    tensors = {name: tensor.to(stored) for name, tensor in lora_tensors().items()}

    a, b = matrices(load(write_checkpoint(tmp_path / "a", lora_config(), tensors)), MODULE)

    assert torch.equal(tensors[f"{PREFIX}.lora_A.weight"].float(), a)
    assert torch.equal(tensors[f"{PREFIX}.lora_B.weight"].float().T, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_blob_has_the_pool_s_dtype_and_the_digest_does_not_depend_on_it(tmp_path: Path, dtype: torch.dtype) -> None:
    wide = load(write_gralora(tmp_path / "a"))
    narrow = load(tmp_path / "a", dtype=dtype)

    assert torch.equal(wide.blob.to(dtype), narrow.blob)
    assert wide.digest == narrow.digest
    assert wide.num_bytes == 2 * narrow.num_bytes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_every_dtype_reaches_every_pool_by_way_of_float32(
    tmp_path: Path, stored: torch.dtype, dtype: torch.dtype
) -> None:
    tensors = {name: tensor.to(stored) for name, tensor in lora_tensors().items()}

    a, b = matrices(load(write_checkpoint(tmp_path / "a", lora_config(), tensors), dtype=dtype), MODULE)

    assert torch.equal(tensors[f"{PREFIX}.lora_A.weight"].float().to(dtype), a)
    assert torch.equal(tensors[f"{PREFIX}.lora_B.weight"].float().to(dtype).T, b)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_neither_the_order_of_tensors_nor_where_a_file_begins_with_them_matters(
    tmp_path: Path, stored: torch.dtype, dtype: torch.dtype
) -> None:
    """Of a header of odd length no tensor is aligned. A file is read from its front to its end, whatever is where."""
    path = write_gralora(tmp_path / "a", hybrid_r=2)
    edit_tensors(path, lambda tensors: tensors.update({name: t.to(stored) for name, t in tensors.items()}))
    expected = load(path, dtype=dtype)

    adapter = load(rewrite(path, padding=3), dtype=dtype)

    assert torch.equal(expected.blob, adapter.blob)
    assert expected.digest == adapter.digest


def test_many_threads_pack_the_same_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gralora(tmp_path / "a", r=8, k=4, hybrid_r=3)
    alone = load(path)
    monkeypatch.setattr(loader, "PIECE_BYTES", 1000)

    with ThreadPoolExecutor(4) as threads:
        shared = load(path, spread=lambda work, items: list(threads.map(work, items)))

    assert torch.equal(alone.blob, shared.blob)
    assert alone.layout == shared.layout


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("modules", "r"), [(MODULES, 2), ((ODD,), 3)], ids=["even", "odd"])
def test_a_pool_that_keeps_16_bits_holds_them_as_they_are(
    tmp_path: Path, stored: torch.dtype, modules: tuple[ModuleShape, ...], r: int
) -> None:
    targets = [module.name for module in modules]
    tensors = {name: tensor.to(stored) for name, tensor in gralora_tensors(modules, r=r, k=r).items()}
    path = write_checkpoint(tmp_path / "a", gralora_config(r=r, k=r, target_modules=targets), tensors)

    wide, kept = load(path, modules), load(path, modules, packing=KEEPING)

    for module in modules:
        ((found,),) = (entries for name, entries in kept.layout.modules if name == module.name)
        assert DTYPES[found.storage] == stored
        for offset, numel, expected in zip(
            (found.a_offset, found.b_offset),
            (found.r * module.in_features, found.r * module.out_features),
            matrices(wide, module),
            strict=True,
        ):
            assert offset % 16 == 0
            assert torch.equal(kept.blob[offset:].view(stored)[:numel].float(), expected.reshape(-1))
    assert kept.layout.summary.packed_numel == kept.layout.numel < 0.7 * wide.layout.numel
    assert kept.digest == wide.digest


def test_a_pair_of_two_dtypes_is_held_in_float32(tmp_path: Path) -> None:
    tensors = gralora_tensors()
    tensors = {name: tensor.half() if name.endswith("A") else tensor.bfloat16() for name, tensor in tensors.items()}
    path = write_checkpoint(tmp_path / "a", gralora_config(), tensors)

    wide, kept = load(path), load(path, packing=KEEPING)

    assert torch.equal(wide.blob, kept.blob)
    assert wide.layout.modules == kept.layout.modules


@pytest.mark.parametrize("piece_bytes", [1, 3_000, 1 << 20])
@pytest.mark.parametrize("kind", ["gralora", "hybrid", "lora", "odd", "of several dtypes"])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_the_backend_s_fast_way_packs_bit_for_bit_what_numpy_packs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: torch.dtype, kind: str, piece_bytes: int
) -> None:
    monkeypatch.setattr(loader, "PIECE_BYTES", piece_bytes)
    modules = (ODD,) if kind == "odd" else MODULES
    write = {
        "gralora": lambda path: write_gralora(path, r=24, k=2),
        "hybrid": lambda path: write_gralora(path, r=8, k=4, hybrid_r=20),
        "lora": lambda path: write_lora(path, r=5),
        "odd": lambda path: write_gralora(path, modules, r=3, k=3, hybrid_r=1),
        "of several dtypes": lambda path: write_gralora(path, hybrid_r=4),
    }[kind]

    def store(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            tensors[name] = tensor.to(torch.float32 if kind == "of several dtypes" and "layers.0" in name else stored)

    path = rewrite(edit_tensors(write(tmp_path / "a"), store), padding=3)
    fast = CpuBackend.packing

    mine, numpys = (load(path, modules, packing=one) for one in (fast, Packing(fast.panel, fast.keeps_16_bit)))

    assert torch.equal(numpys.blob.view(torch.int32), mine.blob.view(torch.int32))
    assert numpys.layout == mine.layout
    assert numpys.bounds == mine.bounds


@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_fast_way_too_finds_what_is_not_finite(tmp_path: Path, value: float, stored: torch.dtype) -> None:
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            tensors[name] = tensor.to(stored)
        tensors[f"{PREFIX}.gralora_A"][1, 2, 3] = value
        tensors[f"{PREFIX}.gralora_B_general.weight"][31, 1] = value

    told = rejection(edit_tensors(write_gralora(tmp_path / "a", hybrid_r=2), damage), packing=CpuBackend.packing)

    assert told == (
        f"tensor {PREFIX}.gralora_A has values that are not finite in float32",
        f"tensor {PREFIX}.gralora_B_general.weight has values that are not finite in float32",
    )


# The digest names what is computed.


def test_the_same_content_has_one_digest_under_any_name_and_training_setting(tmp_path: Path) -> None:
    first = load(write_gralora(tmp_path / "a"))
    noise = {
        "gralora_dropout": 0.1,
        "base_model_name_or_path": "x",
        "peft_version": "1.0",
        "target_modules": "all-linear",
    }
    second = load(write_gralora(tmp_path / "b", **noise))

    assert first.digest == second.digest
    assert len(first.digest) == 64


def test_an_invocation_that_is_switched_off_leaves_no_trace_in_the_digest(tmp_path: Path) -> None:
    first = load(write_lora(tmp_path / "a", alora_invocation_tokens=None))
    config = lora_config(alora_invocation_tokens=[])
    del config["alora_invocation_tokens"]
    absent = load(write_checkpoint(tmp_path / "b", config, lora_tensors()))

    assert first.digest == absent.digest == load(write_lora(tmp_path / "c", alora_invocation_tokens=[])).digest
    assert first.layout.summary.invocation == ()


def test_an_invocation_is_held_against_the_vocabulary_where_that_is_known(tmp_path: Path) -> None:
    path = write_lora(tmp_path / "a", alora_invocation_tokens=[5, 320, 7, 400])

    assert (
        load(path).layout.summary.invocation == load(path, vocab_size=401).layout.summary.invocation == (5, 320, 7, 400)
    )
    assert rejection(path, vocab_size=320) == (
        "alora_invocation_tokens[1]: 320 is not a token id of this model (0 to 319)",
        "alora_invocation_tokens[3]: 400 is not a token id of this model (0 to 319)",
    )


def test_both_dialects_of_the_same_adapter_have_one_digest(tmp_path: Path) -> None:
    peft = load(write_gralora(tmp_path / "peft", r=8, hybrid_r=4))
    authors = load(write_gralora(tmp_path / "authors", r=8, hybrid_r=4, authors=True))

    assert peft.digest == authors.digest


def test_the_same_values_stored_in_another_dtype_have_another_digest(tmp_path: Path) -> None:
    """They are other bytes in a pool that keeps 16 bits, and bytes are what is hashed."""
    values = {name: tensor.bfloat16() for name, tensor in gralora_tensors().items()}
    write_checkpoint(tmp_path / "narrow", gralora_config(), values)
    write_checkpoint(tmp_path / "wide", gralora_config(), {name: tensor.float() for name, tensor in values.items()})

    narrow, wide = load(tmp_path / "narrow"), load(tmp_path / "wide")

    assert torch.equal(narrow.blob, wide.blob)
    assert narrow.digest != wide.digest
    assert narrow.digest == load(tmp_path / "narrow", packing=KEEPING).digest


def test_whatever_changes_the_answer_changes_the_digest(tmp_path: Path) -> None:
    def nudge(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{PREFIX}.gralora_B"][1, 7, 15] += 1e-6

    paths = [
        write_gralora(tmp_path / "a"),
        edit_tensors(write_gralora(tmp_path / "one weight"), nudge),
        write_gralora(tmp_path / "scale", alpha=17),
        write_gralora(tmp_path / "seed", seed=1),
        write_gralora(tmp_path / "k", k=4),
        write_gralora(tmp_path / "rank", r=4),
        write_gralora(tmp_path / "invocation", alora_invocation_tokens=[5, 6]),
        write_gralora(tmp_path / "another", alora_invocation_tokens=[6, 5]),
        write_gralora(tmp_path / "a third", alora_invocation_tokens=[56]),
        write_gralora(tmp_path / "module", MODULES[:-1], target_modules=[module.name for module in MODULES[:-1]]),
    ]

    assert len(paths) == len({load(path).digest for path in paths})


def test_the_same_bytes_with_another_k_have_another_digest(tmp_path: Path) -> None:
    """k = 1 and k = 2 of these tensors pack to the same matrices; only the block exchange differs."""
    zeros = {name: torch.zeros_like(tensor) for name, tensor in gralora_tensors(k=1).items()}
    write_checkpoint(tmp_path / "one", gralora_config(k=1), zeros)
    zeros = {name: torch.zeros_like(tensor) for name, tensor in gralora_tensors(k=2).items()}
    write_checkpoint(tmp_path / "two", gralora_config(k=2), zeros)

    one, two = load(tmp_path / "one"), load(tmp_path / "two")

    assert torch.equal(one.blob, two.blob)
    assert one.digest != two.digest


# What is refused.


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_every_tensor_that_is_not_finite_is_named(tmp_path: Path, value: float, stored: torch.dtype) -> None:
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            tensors[name] = tensor.to(stored)
        tensors[f"{PREFIX}.gralora_A"][1, 2, 3] = value
        tensors[f"{PREFIX}.gralora_B_general.weight"][31, 1] = value

    told = rejection(edit_tensors(write_gralora(tmp_path / "a", hybrid_r=2), damage))
    expected = (
        f"tensor {PREFIX}.gralora_A has values that are not finite in float32",
        f"tensor {PREFIX}.gralora_B_general.weight has values that are not finite in float32",
    )

    assert expected == told


def test_what_is_wrong_is_told_in_the_order_of_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However the file has its tensors, and whoever comes upon them first."""
    monkeypatch.setattr(loader, "PIECE_BYTES", 1)

    def backwards(work: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        return [work(item) for item in reversed(items)]

    path = edit_tensors(write_gralora(tmp_path / "a"), lambda tensors: [t.fill_(math.nan) for t in tensors.values()])
    names = [f"base_model.model.{module.name}.gralora_{letter}" for module in MODULES for letter in "AB"]

    expected = tuple(f"tensor {name} has values that are not finite in float32" for name in names)

    assert expected == rejection(path)
    assert expected == rejection(rewrite(path), spread=backwards)


def test_values_that_the_pool_s_dtype_cannot_hold_are_not_finite(tmp_path: Path) -> None:
    path = edit_tensors(write_gralora(tmp_path / "a"), lambda tensors: tensors[f"{PREFIX}.gralora_A"].fill_(70_000.0))

    assert load(path).digest
    assert "not finite in float16" in rejection(path, dtype=torch.float16)[0]

    narrow = edit_tensors(path, lambda tensors: tensors.update({n: t.bfloat16() for n, t in tensors.items()}))
    assert load(narrow).digest
    assert "not finite in float16" in rejection(narrow, dtype=torch.float16)[0]


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16], ids=str)
def test_the_largest_values_of_16_bits_are_finite(tmp_path: Path, stored: torch.dtype) -> None:
    def fill(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            tensors[name] = torch.full_like(tensor, -torch.finfo(stored).max, dtype=stored)

    assert load(edit_tensors(write_gralora(tmp_path / "a"), fill)).digest


def test_a_float64_that_float32_cannot_hold_is_not_finite(tmp_path: Path) -> None:
    tensors = {name: tensor.double() for name, tensor in gralora_tensors().items()}
    tensors[f"{PREFIX}.gralora_A"][0, 0, 0] = 1e300
    write_checkpoint(tmp_path / "a", gralora_config(), tensors)

    assert "not finite" in rejection(tmp_path / "a")[0]


def test_a_rank_beyond_the_kernels_is_refused(tmp_path: Path) -> None:
    path = write_gralora(tmp_path / "a", r=8, k=4, hybrid_r=2)

    assert load(path, max_width=34).layout.width == 34
    assert rejection(path, max_width=33) == ("its rank r * k + hybrid_r is 34, this server takes at most 33",)


def test_a_file_that_is_cut_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gralora(tmp_path / "a")
    inspect = loader.inspect

    def inspect_then_cut(*args: Any, **options: Any) -> Any:
        header = inspect(*args, **options)
        os.truncate(path / WEIGHTS_FILE, header.file_bytes - 4)
        return header

    monkeypatch.setattr(loader, "inspect", inspect_then_cut)

    assert (f"{WEIGHTS_FILE} changed while it was being read",) == rejection(path)


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gralora(tmp_path / "a")
    inspect = loader.inspect

    def inspect_then_replace(*args: Any, **options: Any) -> Any:
        header = inspect(*args, **options)
        save_file({"other": torch.zeros(1)}, path / WEIGHTS_FILE)
        return header

    monkeypatch.setattr(loader, "inspect", inspect_then_replace)

    assert (f"{WEIGHTS_FILE} changed while it was being read",) == rejection(path)


def test_a_file_that_is_cut_between_two_tensors_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After its header was found to be the same."""
    path = write_gralora(tmp_path / "a")
    check_unchanged = loader.check_unchanged

    def check_then_cut(opened: Any, header: Any) -> None:
        check_unchanged(opened, header)
        os.truncate(path / WEIGHTS_FILE, header.file_bytes // 2)

    monkeypatch.setattr(loader, "check_unchanged", check_then_cut)

    assert (f"{WEIGHTS_FILE} changed while it was being read",) == rejection(path)


def test_a_read_that_stops_early_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system may give less than it is asked for."""
    path = write_gralora(tmp_path / "a")
    expected, preadv = load(path), os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, buffers, start: preadv(file, [buffers[0][:1000]], start))

    assert torch.equal(expected.blob, load(path).blob)


def test_broken_adapters_are_refused_by_load_as_by_inspect(tmp_path: Path) -> None:
    path = edit_config(write_gralora(tmp_path / "a"), bias="some")

    assert rejection(path) == ("bias: 'some' is not supported (none, gralora_only, all are)",)
