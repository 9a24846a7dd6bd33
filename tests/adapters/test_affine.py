"""Vectors of a checkpoint, trained magnitudes and biases: what they become, what they cost, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.checkpoints import MODULES, edit_tensors, write_gralora, write_lora
from torch import Tensor, nn

from gralora_kernels.cpu.linear import PackedWeight
from gralora_kernels.cpu.packed_rows import row_norms, rows_of
from gralora_kernels.packing import ROW_MAJOR, Array, Packing
from gralora_runtime.adapters.checkpoint.header import inspect
from gralora_runtime.adapters.checkpoint.loader import LoadedAdapter, load
from gralora_runtime.adapters.checkpoint.mixture import Ingredient, mixed
from gralora_runtime.adapters.checkpoint.naming import Naming, take_apart
from gralora_runtime.adapters.checkpoint.spec import ModuleShape
from gralora_runtime.adapters.checkpoint.unpacking import updates_in
from gralora_runtime.adapters.checkpoint.update import dense
from gralora_runtime.errors import AdapterRejectedError

BIASED = tuple(replace(module, has_bias=module.name.endswith("q_proj")) for module in MODULES)
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


class Base:
    """Weights that are known, and biases of those modules that have one."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(9)
        self.weights = {m.name: torch.randn(m.out_features, m.in_features, generator=generator) for m in MODULES}
        self.biases = {m.name: torch.randn(m.out_features, generator=generator).numpy() for m in BIASED if m.has_bias}

    def bias(self, module: str) -> Array | None:
        return self.biases.get(module)

    def factor(self, module: str) -> float:
        return 1.0

    def norms(self, module: str, a: Array, b: Array) -> Array:
        norms: Array = torch.linalg.vector_norm(self.weights[module] + torch.from_numpy(b @ a), dim=1).double().numpy()
        return norms

    def rows(self, module: str, first: int, count: int) -> Array:
        return self.weights[module][first : first + count].numpy()


BASE = Base()


def write_dora(folder: Path, *, seed: int = 0, **config: object) -> Path:
    def add(tensors: dict[str, Tensor]) -> None:
        generator = torch.Generator().manual_seed(seed)
        for module in MODULES:
            name = f"base_model.model.{module.name}.lora_magnitude_vector"
            tensors[name] = torch.rand(module.out_features, generator=generator) + 0.5

    return edit_tensors(write_lora(folder, use_dora=True, **config), add)


def loaded(path: Path, dtype: torch.dtype = torch.float32, packing: Packing | None = None) -> LoadedAdapter:
    return load(path.name, path, BIASED, dtype, max_width=64, base=BASE, **({"packing": packing} if packing else {}))


def gains_and_shifts(adapter: LoadedAdapter, module: str) -> tuple[Tensor, Tensor]:
    (shape,) = (one for one in MODULES if one.name == module)
    both = adapter.blob[dict(adapter.layout.affines)[module] :].view(torch.float32)[: 2 * shape.out_features]
    return both[: shape.out_features], both[shape.out_features :]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_gains_of_a_dora_are_fp32_in_any_pool(tmp_path: Path, dtype: torch.dtype) -> None:
    path = write_dora(tmp_path / "a")
    adapter = loaded(path, dtype)
    tensors = {name: torch.empty(info.shape) for name, info in inspect(path).tensors.items()}

    gains, shifts = gains_and_shifts(adapter, MODULES[0].name)
    exact = loaded(path)
    assert torch.equal(gains, gains_and_shifts(exact, MODULES[0].name)[0])
    assert adapter.layout.summary.packed_numel == adapter.layout.numel == len(adapter.blob)
    assert all(offset % 16 == 0 for _, offset in adapter.layout.affines)
    assert f"{Q0}.lora_magnitude_vector" in tensors
    # What DoRA leaves alone is the bias: gain * bias + shift is the bias again.
    torch.testing.assert_close(gains * torch.from_numpy(BASE.biases[MODULES[0].name]) + shifts,
                               torch.from_numpy(BASE.biases[MODULES[0].name]))  # fmt: skip


def test_sixteen_bits_stay_beside_gains(tmp_path: Path) -> None:
    path = edit_tensors(
        write_dora(tmp_path / "a"), lambda tensors: tensors.update({k: v.half() for k, v in tensors.items()})
    )
    adapter = loaded(path, packing=Packing(keeps_16_bit=True))

    assert {entry.storage.name for _, entries in adapter.layout.modules for entry in entries} == {"FLOAT16"}
    assert adapter.layout.summary.packed_numel == adapter.layout.numel
    assert torch.isfinite(gains_and_shifts(adapter, MODULES[1].name)[0]).all()


def test_whatever_a_vector_says_changes_the_digest(tmp_path: Path) -> None:
    plain = load("plain", write_lora(tmp_path / "plain"), BIASED, torch.float32, max_width=64)
    doras = [loaded(write_dora(tmp_path / str(seed), seed=seed)) for seed in (0, 1)]
    halved = edit_tensors(
        write_dora(tmp_path / "half"),
        lambda tensors: tensors.update({k: v.half() for k, v in tensors.items() if "magnitude" in k}),
    )

    assert len({plain.digest, *(dora.digest for dora in doras), loaded(halved).digest}) == 4
    assert loaded(write_dora(tmp_path / "again")).digest == doras[0].digest


def test_a_trained_bias_comes_in_the_place_of_the_base_s(tmp_path: Path) -> None:
    def add(tensors: dict[str, Tensor]) -> None:
        for module in BIASED:
            if module.has_bias:
                tensors[f"base_model.model.{module.name}.bias"] = torch.arange(32.0)

    path = edit_tensors(write_gralora(tmp_path / "a", bias="all", target_modules=["v_proj", "down_proj"]), add)
    q_alone = [name for name in inspect(path).tensors if "q_proj.gralora" in name]
    edit_tensors(path, lambda tensors: [tensors.pop(name) for name in q_alone])
    gains, shifts = gains_and_shifts(loaded(path), MODULES[0].name)

    assert torch.equal(gains, torch.ones(32))
    torch.testing.assert_close(shifts + torch.from_numpy(BASE.biases[MODULES[0].name]), torch.arange(32.0))
    assert {name for name, _ in loaded(path).layout.affines} == {m.name for m in BIASED if m.has_bias}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t: t.pop(f"{Q0}.lora_magnitude_vector"), f"tensor {Q0}.lora_magnitude_vector is missing"),
        (lambda t: t.update({f"{Q0}.lora_magnitude_vector": torch.ones(31)}), "has shape [31], the base"),
        (lambda t: t.update({f"{Q0}.lora_magnitude_vector": torch.full((32,), torch.nan)}), "make no finite numbers"),
        (lambda t: t.update({f"{Q0}.lora_magnitude_vector": torch.ones(32).int()}), "dtype I32 is not supported"),
        (lambda t: t.update({f"{Q0}.base_layer.bias": torch.ones(32)}), "base_layer.bias is surplus"),
        (lambda t: t.update({"base_model.model.model.norm.bias": torch.ones(32)}), "no layer model.norm for it"),
    ],
    ids=["missing", "short", "not finite", "integers", "surplus", "of a norm"],
)  # fmt: skip
def test_what_is_wrong_with_a_vector_is_told(tmp_path: Path, change, told: str) -> None:
    with pytest.raises(AdapterRejectedError) as caught:
        loaded(edit_tensors(write_dora(tmp_path / "a"), change))

    assert told in str(caught.value)


def test_a_row_of_zeros_has_no_magnitude(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BASE, "norms", lambda _module, _a, b: np.zeros(len(b)))

    with pytest.raises(AdapterRejectedError, match="trained magnitudes make no finite numbers of this base model's"):
        loaded(write_dora(tmp_path / "a"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_copy_of_the_base_weight_has_to_be_the_base_weight(tmp_path: Path, dtype: torch.dtype) -> None:
    """PEFT saves one beside a pair on the output head."""
    weight = BASE.weights[MODULES[0].name].to(dtype, copy=True)
    with_copy = edit_tensors(write_lora(tmp_path / "a"), lambda t: t.update({f"{Q0}.base_layer.weight": weight}))

    assert loaded(with_copy).digest == loaded(write_lora(tmp_path / "b")).digest

    weight[31, 31] += 0.1
    edit_tensors(with_copy, lambda t: t.update({f"{Q0}.base_layer.weight": weight}))
    with pytest.raises(AdapterRejectedError, match=r"base_layer.weight is not the base model's weight"):
        loaded(with_copy)


def weight_and_bias(adapter: LoadedAdapter, module: ModuleShape) -> tuple[Tensor, Tensor]:
    """Of the layer that computes what the adapter makes of the base's."""
    weight, bias = BASE.weights[module.name], torch.from_numpy(BASE.biases.get(module.name, np.zeros(1, np.float32)))
    for pair in updates_in(adapter, MODULES).get(module.name, ()):
        weight = weight + dense(pair)
    if module.name not in dict(adapter.layout.affines):
        return weight, bias
    gains, shifts = gains_and_shifts(adapter, module.name)
    return gains[:, None] * weight, gains * bias + shifts


def test_a_sum_of_adapters_with_gains_is_the_sum_of_what_each_changes(tmp_path: Path) -> None:
    weights = (0.7, -0.4, 1.5, 0.5)
    adapters = [
        loaded(write_dora(tmp_path / "a")),
        loaded(write_dora(tmp_path / "b", seed=1, r=3)),
        loaded(write_gralora(tmp_path / "c", r=8, k=4)),
        loaded(write_lora(tmp_path / "d", r=2)),
    ]
    parts = [Ingredient(adapter, weight) for adapter, weight in zip(adapters, weights, strict=True)]
    made = mixed("m", parts, BIASED, packing=ROW_MAJOR, max_width=256)

    assert len(made.blob) == made.layout.numel == made.layout.summary.packed_numel
    for module in BIASED:
        base, bias = BASE.weights[module.name], torch.from_numpy(BASE.biases.get(module.name, np.zeros(1, np.float32)))
        own = [weight_and_bias(adapter, module) for adapter in adapters]
        found = weight_and_bias(made, module)
        for place, before in enumerate((base, bias)):
            wanted = before + sum(w * (one[place] - before) for w, one in zip(weights, own, strict=True))
            torch.testing.assert_close(found[place], wanted, rtol=1e-4, atol=1e-4)


def test_a_sum_in_which_an_output_vanishes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dora = write_dora(tmp_path / "a")
    ones = {f"base_model.model.{m.name}.lora_magnitude_vector": torch.ones(m.out_features) for m in MODULES}
    edit_tensors(dora, lambda tensors: tensors.update(ones))
    monkeypatch.setattr(BASE, "norms", lambda _module, _a, b: np.full(len(b), 2.0))  # gains are 0.5: 1 + 2 * (0.5 - 1)

    with pytest.raises(AdapterRejectedError, match="with these weights some outputs all but vanish"):
        mixed("m", [Ingredient(loaded(dora), 2.0)], BIASED, packing=ROW_MAJOR, max_width=256)


@pytest.mark.parametrize("adapter", ["", "default"])
@pytest.mark.parametrize("matrix", ["lora_magnitude_vector", "lora_B.bias", "base_layer.bias", "bias"])
def test_names_of_vectors_are_read_back(adapter: str, matrix: str) -> None:
    naming = Naming(adapter=adapter)
    taken = take_apart(naming.tensor("model.layers.0.self_attn.q_proj", matrix))

    assert taken is not None
    assert taken.matrix == matrix
    assert naming.module(taken) == "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("storage", ["fp32", "bf16", "4 bits", "8 bits"])
@pytest.mark.parametrize(("first", "count"), [(0, 40), (24, 16), (7, 20), (33, 7)])
def test_norms_of_rows_of_any_storage(storage: str, first: int, count: int) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(40, 64, generator=generator)
    if storage == "bf16":
        weight = weight.bfloat16().float()
    if storage == "4 bits":
        weight = torch.randint(0, 16, (40, 64), generator=generator) * 0.5 - 4.0
    if storage == "8 bits":
        weight = torch.randint(-127, 128, (40, 64), generator=generator) * 0.25
    packed = PackedWeight(weight, least_bits=32 if storage == "fp32" else 4)
    a, b = torch.randn(3, 64, generator=generator), torch.randn(count, 3, generator=generator)

    found = row_norms(packed, first, a.numpy(), b.numpy())

    assert (int(packed.storage) == 0) == (storage == "fp32")
    np.testing.assert_array_equal(rows_of(packed, first, count), weight[first:][:count].numpy())
    expected = torch.linalg.vector_norm(nn.functional.linear(torch.eye(64), weight[first:][:count] + b @ a).T, dim=1)
    np.testing.assert_allclose(found, expected.double().numpy(), rtol=1e-6)
