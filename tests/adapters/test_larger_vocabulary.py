"""Checkpoints with more tokens than the base model: what is read of them, and what is refused and why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.larger import BOTH, NEW, save_larger
from support.peft_adapters import gralora_config, lora_config, save_adapter
from support.served import Served, serving
from support.tiny_models import VOCAB_SIZE, tiny_model

from gralora_runtime.adapters.checkpoint.conversion import convert
from gralora_runtime.adapters.checkpoint.header import inspect
from gralora_runtime.adapters.checkpoint.spec import Dialect
from gralora_runtime.adapters.checkpoint.whole import read_whole
from gralora_runtime.errors import AdapterConversionError, AdapterRejectedError
from gralora_runtime.model.adaptable import changeable_shapes

PREFIX = "base_model.model."
ENDS = ["embed_tokens", "lm_head"]


def fits(folder: Path, architecture: str = "llama", *, tied: bool = False) -> str:
    return "\n".join(inspect(folder).fits(changeable_shapes(tiny_model(architecture, tied=tied))))


def edit(folder: Path, **changes: torch.Tensor | None) -> Path:
    """None takes a tensor away. `__` stands for a dot."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    for spelled, tensor in changes.items():
        name = PREFIX + spelled.replace("__", ".")
        assert name in tensors, sorted(tensors)
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (
            lora_config("llama", 4, target_modules=["q_proj", "embed_tokens"]),
            "3 more than the base model, whose rows (base_model.model.lm_head.weight) are not in the file: save_pretr",
        ),
        (lora_config("llama", 4, target_modules=["lm_head"]), "model.embed_tokens of added tokens"),
        (
            lora_config("llama", 4, target_modules=["q_proj", *ENDS], use_dora=True),
            "nothing but a plain LoRA is served",
        ),
        (lora_config("llama", 4, target_modules=["lm_head"], lora_bias=True), "nothing but a plain LoRA is served"),
        (gralora_config("llama", 4, 1, target_modules=["lm_head"]), "nothing but a plain LoRA is served"),
        (
            lora_config("llama", 4, target_modules=["q_proj"], alora_invocation_tokens=[5, 6]),
            "not served of an adapter that begins at tokens of the prompt",
        ),
    ],
    ids=["no head", "no embedding", "DoRA", "biases", "blocks", "activated"],
)
def test_what_is_refused_says_why(config: Any, told: str, tmp_path: Path) -> None:
    assert told in fits(save_larger("llama", config, tmp_path / "a"))


def test_a_head_with_biases_brings_none_for_them(tmp_path: Path) -> None:
    assert "not served beside biases of the output head" in fits(
        save_larger("phi", lora_config("phi", 4, **BOTH), tmp_path / "a"), "phi"
    )


def test_tokens_whose_embedding_is_not_in_the_file(tmp_path: Path) -> None:
    config = lora_config("llama", 4, target_modules=["q_proj"], trainable_token_indices=NEW)
    folder = save_larger("llama", config, tmp_path / "a")
    edit(folder, model__embed_tokens__token_adapter__base_layer__weight=None, lm_head__weight=None)

    assert "320 is not a token id of this model (0 to 319); if it was added, save_pretrained(" in fits(folder)


def test_ends_of_different_sizes(tmp_path: Path) -> None:
    folder = save_larger("llama", lora_config("llama", 4, **BOTH), tmp_path / "a")
    head = torch.zeros(VOCAB_SIZE + 2, 64)
    edit(folder, lm_head__weight=head, lm_head__modules_to_save__weight=head.clone())

    assert "tensor base_model.model.lm_head.weight has shape [322, 64], the base model needs [323, 64]" in fits(folder)


def test_all_that_peft_saves_beside_whole_modules_may_be_there_for_a_vocabulary_that_is_not_larger(
    tmp_path: Path,
) -> None:
    config = lora_config("llama", 4, **BOTH)

    assert fits(save_adapter(tiny_model("llama"), config, tmp_path / "a", save_embedding_layers=True)) == ""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("larger")
    with serving("llama", folder / "model", folder / "adapters", configs={"plain": lora_config("llama", 4)}) as served:
        yield served


def refusal(served: Served, folder: Path) -> str:
    with pytest.raises(AdapterRejectedError) as refused:
        served.parts.adapters.acquire(folder.name).result(30)
    return str(refused.value)


def test_rows_of_the_base_models_tokens_have_to_be_the_base_models(served: Served) -> None:
    config = lora_config("llama", 4, target_modules=["q_proj"])
    folder = save_larger("llama", config, served.adapters_dir / "other-base")
    weights = load_file(folder / "adapter_model.safetensors")[f"{PREFIX}lm_head.weight"]
    weights[VOCAB_SIZE - 1, 7] += 1e-3
    edit(folder, lm_head__weight=weights)

    assert "tensor base_model.model.lm_head.weight is not the base model's weight" in refusal(served, folder)


def test_what_is_there_twice_has_to_be_the_same(served: Served) -> None:
    folder = save_larger("llama", lora_config("llama", 4, **BOTH), served.adapters_dir / "two-heads")
    weights = load_file(folder / "adapter_model.safetensors")[f"{PREFIX}lm_head.weight"]
    weights[0, 0] += 1
    edit(folder, lm_head__modules_to_save__weight=weights)

    assert "lm_head.modules_to_save.weight is not what base_model.model.lm_head.weight is" in refusal(served, folder)


def test_rows_that_are_no_numbers(served: Served) -> None:
    config = lora_config("llama", 4, target_modules=["q_proj"])
    folder = save_larger("llama", config, served.adapters_dir / "no-numbers")
    weights = load_file(folder / "adapter_model.safetensors")[f"{PREFIX}lm_head.weight"]
    weights[VOCAB_SIZE + 1, 7] = torch.nan
    edit(folder, lm_head__weight=weights)

    assert "tensor base_model.model.lm_head.weight has values that are not finite" in refusal(served, folder)


@pytest.mark.parametrize("changed", ["lm_head__weight", "model__embed_tokens__weight"])
def test_the_digest_is_of_their_rows_too(served: Served, changed: str) -> None:
    """And tools know it."""
    digests = []
    for at in range(2):
        config = lora_config("llama", 4, target_modules=["q_proj"])
        folder = save_larger("llama", config, served.adapters_dir / f"{changed}-{at}")
        weights = load_file(folder / "adapter_model.safetensors")[PREFIX + changed.replace("__", ".")]
        weights[VOCAB_SIZE] += at
        edit(folder, **{changed: weights})
        lease = served.parts.adapters.acquire(folder.name).result(30)
        served.parts.adapters.release(lease)
        digests.append(lease.digest)
        assert read_whole(folder, changeable_shapes(tiny_model("llama"))).digest == lease.digest

    assert digests[0] != digests[1]


def test_what_may_have_added_tokens_is_not_converted(tmp_path: Path) -> None:
    """Without a base model nobody can tell."""
    folder = save_larger("llama", lora_config("llama", 4, target_modules=["q_proj"]), tmp_path / "a")

    with pytest.raises(AdapterConversionError, match="may have rows of added tokens"):
        convert(read_whole(folder), Dialect.PEFT_GRALORA)
