"""A multimodal model's language model is served alone, with adapters that were trained inside of the whole."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.served import check_against_peft, serving
from support.tiny_models import save_tiny_model, tiny_model

from gralora_runtime.errors import ModelUnsupportedError
from gralora_runtime.model.loading import load_as_stored, load_base_model
from gralora_runtime.model.module_shapes import kv_token_numel, module_shapes
from gralora_runtime.model.programs.cpu import CpuRunner

MULTIMODAL = "gemma3-multimodal"
TODAY, BEFORE = "model.language_model.", "language_model.model."  # as transformers spells it


def test_its_language_model_has_pefts_logits(tmp_path: Path) -> None:
    with serving(MULTIMODAL, tmp_path / "model", tmp_path / "adapters") as served:
        assert isinstance(served.parts.runner, CpuRunner)
        check_against_peft(served, 9)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(MULTIMODAL, tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("spelling", [TODAY, BEFORE])
def test_weights_are_found_however_they_are_spelled(spelling: str, saved: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "model"))
    spelled = {_respelled(name, spelling): weight for name, weight in load_file(folder / "model.safetensors").items()}
    save_file(spelled, folder / "model.safetensors", {"format": "pt"})
    whole = tiny_model(MULTIMODAL).state_dict()

    base = load_base_model(folder, device=torch.device("cpu"), dtype="auto")
    stored = load_as_stored(folder)

    for model in (base.model, stored):
        assert type(model).__name__ == "Gemma3ForCausalLM"
        for name, weight in model.state_dict().items():
            inside = name if name.startswith("lm_head") else TODAY + name.removeprefix("model.")
            assert torch.equal(weight, whole[inside]), name


def test_what_is_said_of_the_whole_counts_for_its_language_model(saved: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "model"))
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(written | {"eos_token_id": [1, 106]}))

    assert load_base_model(folder, device=torch.device("cpu"), dtype="auto").eos_token_ids == {1, 106}

    quantized = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(written | {"quantization_config": quantized}))
    with pytest.raises(ModelUnsupportedError, match="quantized checkpoints are not served"):
        load_base_model(folder, device=torch.device("cpu"), dtype="auto")


def _respelled(name: str, spelling: str) -> str:
    """Whichever way the installed version of transformers writes it."""
    today = name.replace(BEFORE, TODAY).removeprefix("language_model.")
    if spelling == BEFORE and today.startswith("lm_head"):
        return f"language_model.{today}"
    return today.replace(TODAY, spelling)


def test_sizes_are_of_the_language_model(saved: Path) -> None:
    names = {shape.name for shape in module_shapes(saved)}

    assert "model.layers.1.mlp.down_proj" in names
    assert not any("vision" in name for name in names)
    assert kv_token_numel(saved) == 2 * 2 * 2 * 16
