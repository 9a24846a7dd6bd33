"""PEFT saves, we load: the packed arena through the reference kernel gives what PEFT's own layer adds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file, save_file
from support.peft_adapters import gralora_config, in_authors_dialect, lora_config, save_adapter
from support.tiny_models import tiny_model
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from gralora_kernels.grouping import Grouping
from gralora_kernels.reference.adapters import ReferenceBackend
from gralora_runtime.adapters.checkpoint.loader import load
from gralora_runtime.adapters.checkpoint.spec import ModuleShape
from gralora_runtime.adapters.checkpoint.tensors import WEIGHTS_FILE
from gralora_runtime.adapters.residency.pool import AdapterPool

CPU = torch.device("cpu")
ARCHITECTURES = ("llama", "gpt2", "phi3")
TOLERANCE = 1e-5  # of the update's largest value, in float32


@pytest.fixture(scope="module", params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(architecture: str) -> PreTrainedModel:
    return tiny_model(architecture)


def shapes(model: PreTrainedModel) -> tuple[ModuleShape, ...]:
    """Every linear layer but the output layer, as the model loader lists them."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            found.append(ModuleShape(name, module.in_features, module.out_features))
        elif isinstance(module, Conv1D):
            found.append(ModuleShape(name, *module.weight.shape, transposed=True))
    return tuple(found)


def peft_updates(model: PreTrainedModel, folder: Path, tokens: int = 5) -> Iterator[tuple[str, Any, Any]]:
    """For each adapted module: its name, an input, and what PEFT adds to the base layer's answer."""
    adapted = PeftModel.from_pretrained(model, folder).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, layer in adapted.base_model.model.named_modules():
            if not hasattr(layer, "base_layer"):
                continue
            x = torch.randn(1, tokens, layer.in_features, generator=generator)
            # In float64, so that the base layer's part cancels without a trace.
            exact = layer.double()
            yield name, x[0], (exact(x.double()) - exact.base_layer(x.double()))[0].float()
            layer.float()
    adapted.unload()


def stored_as(folder: Path, dtype: torch.dtype) -> Path:
    """The checkpoint with its weights rounded to `dtype`."""
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(folder / WEIGHTS_FILE).items()}
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    return folder


def our_update(pool: AdapterPool, slot: int, width: int, module: str, x: torch.Tensor) -> torch.Tensor:
    table = pool.tables[module]
    grouping = Grouping(len(x))
    grouping.fill(np.full(len(x), slot, np.int32), {slot: width})
    group = table.group
    y = torch.zeros(len(x), group.out_features)  # [tokens, sum(out)]
    ReferenceBackend().apply(y, x, pool.arena, group, grouping)
    start = group.column_starts[group.modules.index(table)]
    return y[:, start : start + table.out_features]


def check_against_peft(model: PreTrainedModel, folder: Path) -> None:
    modules = shapes(model)
    adapter = load("a", folder, modules, torch.float32, max_width=512, packing=ReferenceBackend.packing)
    pool = AdapterPool(modules=modules, device=CPU, dtype=torch.float32, pool_bytes=8 << 20, max_slots=4)
    filler = pool.place(adapter)  # so that the one under test is neither in slot 0 nor at offset 0
    assert filler is not None
    pool.withdraw(filler)
    resident = pool.place(adapter)
    assert resident is not None
    assert resident.offset > 0

    checked = 0
    for name, x, expected in peft_updates(model, folder):
        actual = our_update(pool, resident.slot, adapter.layout.width, name, x)
        assert expected.abs().max() > 1e-3, "an update of nothing would prove nothing"
        assert (expected - actual).abs().max() <= TOLERANCE * expected.abs().max(), name
        checked += 1
    assert len(adapter.layout.modules) == checked


@pytest.mark.parametrize(("r", "k", "hybrid_r"), [(8, 2, 0), (8, 4, 4), (4, 1, 0), (8, 8, 1), (16, 4, 0)], ids=str)
def test_gralora(tmp_path: Path, model: PreTrainedModel, architecture: str, r: int, k: int, hybrid_r: int) -> None:
    config = gralora_config(architecture, r, k, hybrid_r=hybrid_r, alpha=3 * r)

    check_against_peft(model, save_adapter(model, config, tmp_path))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["gralora", "lora"])
def test_weights_of_16_bits(
    tmp_path: Path, model: PreTrainedModel, architecture: str, kind: str, dtype: torch.dtype
) -> None:
    """PEFT widens them when it loads; here they are held as they are."""
    config = gralora_config(architecture, 8, 2, hybrid_r=3) if kind == "gralora" else lora_config(architecture, 5)

    check_against_peft(model, stored_as(save_adapter(model, config, tmp_path), dtype))


def test_the_authors_dialect(tmp_path: Path, model: PreTrainedModel, architecture: str) -> None:
    """Their tensors are PEFT's; PEFT's own layer, told the translated r and alpha, is the oracle."""
    config = gralora_config(architecture, 8, 2, hybrid_r=4, alpha=20)
    peft = save_adapter(model, config, tmp_path / "peft")
    authors = in_authors_dialect(save_adapter(model, config, tmp_path / "authors"))

    ours = [load("a", folder, shapes(model), torch.float32, max_width=512) for folder in (peft, authors)]
    (_, entries), *_ = ours[1].layout.modules

    assert [(entry.r, entry.k, entry.scale) for entry in entries] == [(8, 2, 20 / 12), (4, 1, 20 / 12)]
    assert ours[0].digest == ours[1].digest
    check_against_peft(model, peft)


LORAS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True, "alpha": 7},
    "patterns": {
        "rank_pattern": {"layers.1.mlp.down_proj": 2, r"h\.0\.attn\.c_attn": 3, "o_proj": 5, "qkv_proj": 1},
        "alpha_pattern": {r"layers\.\d+\.self_attn\..*": 3, "c_fc": 5.5},
    },
    "patterns and rslora": {
        "rank_pattern": {"^model.layers.0.self_attn.o_proj": 6, "^transformer.h.1.mlp.c_fc": 6},
        "alpha_pattern": {"o_proj": 9, "c_fc": 9},
        "use_rslora": True,
    },
    "one layer": {"layers_to_transform": [1]},
}


@pytest.mark.parametrize("kind", LORAS)
# Each of the patterns is for one architecture, and PEFT says so about the others.
@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning")
def test_lora(tmp_path: Path, model: PreTrainedModel, architecture: str, kind: str) -> None:
    config: PeftConfig = lora_config(architecture, 4, **LORAS[kind])

    check_against_peft(model, save_adapter(model, config, tmp_path))


@pytest.mark.parametrize("kind", ["gralora", "lora"])
def test_all_linear(tmp_path: Path, model: PreTrainedModel, architecture: str, kind: str) -> None:
    make: Any = gralora_config if kind == "gralora" else lora_config
    options: tuple[Any, ...] = (8, 2) if kind == "gralora" else (4,)

    check_against_peft(model, save_adapter(model, make(architecture, *options, target_modules="all-linear"), tmp_path))
