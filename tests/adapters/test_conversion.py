"""An adapter and what it was converted to compute the same: for PEFT, for our loader, and mostly to the last bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file
from support.checkpoints import (
    MODULES,
    edit_tensors,
    lora_config,
    lora_tensors,
    write_checkpoint,
    write_gralora,
    write_lora,
)
from support.peft_adapters import gralora_config, in_authors_dialect, save_adapter
from support.peft_adapters import lora_config as peft_lora_config
from support.tiny_models import VOCAB_SIZE, tiny_model
from transformers import PreTrainedModel

from gralora_runtime.adapters.checkpoint.conversion import alpha_for, convert
from gralora_runtime.adapters.checkpoint.header import CONFIG_FILE
from gralora_runtime.adapters.checkpoint.loader import load
from gralora_runtime.adapters.checkpoint.spec import Dialect
from gralora_runtime.adapters.checkpoint.tensors import WEIGHTS_FILE
from gralora_runtime.adapters.checkpoint.update import dense, minus, norm
from gralora_runtime.adapters.checkpoint.whole import read_whole
from gralora_runtime.adapters.checkpoint.writer import write_adapter
from gralora_runtime.errors import AdapterConversionError

PEFT, AUTHORS, LORA = Dialect.PEFT_GRALORA, Dialect.AUTHORS_GRALORA, Dialect.LORA
BLOCKS = [(8, 2, 0), (8, 4, 3), (4, 1, 0), (8, 8, 1)]


def converted(source: Path, to: Dialect, out: Path) -> Path:
    found = convert(read_whole(source), to)
    write_adapter(out, found.config, found.tensors)
    return out


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / CONFIG_FILE).read_text())


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / WEIGHTS_FILE)


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


def check_same_updates(a: Path, b: Path) -> None:
    """Dense updates, within one rounding of float32 of the largest value; and our loader takes both."""
    of_a, of_b = read_whole(a).updates(), read_whole(b).updates()
    assert of_a.keys() == of_b.keys()
    for module, update in of_a.items():
        theirs = sum(map(dense, update))
        assert torch.allclose(theirs, sum(map(dense, of_b[module])), rtol=0, atol=1e-6 * float(theirs.abs().max()))
        assert norm((*update, *minus(of_b[module]))) <= 1e-14 * norm(update)
    loaded = [load("x", folder, [module.module for module in read_whole(a).plan], torch.float32, max_width=512)
              for folder in (a, b)]  # fmt: skip
    assert loaded[0].layout.width == loaded[1].layout.width


def logits(model: PreTrainedModel, folder: Path) -> torch.Tensor:
    adapted = PeftModel.from_pretrained(model, folder).eval()
    tokens = torch.arange(3, 43)[None] * 7 % VOCAB_SIZE
    with torch.no_grad():
        found = adapted(input_ids=tokens).logits
    adapted.unload()
    return found


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3"])
@pytest.mark.parametrize(("r", "k", "hybrid_r"), BLOCKS, ids=str)
def test_peft_computes_the_same_with_the_lora(architecture: str, r: int, k: int, hybrid_r: int, tmp_path: Path) -> None:
    model = tiny_model(architecture).double()  # so that what is compared is the adapters, and not the order of sums
    source = save_adapter(model.float(), gralora_config(architecture, r, k, hybrid_r=hybrid_r, alpha=5), tmp_path / "a")
    lora = converted(source, LORA, tmp_path / "lora")

    expected, actual = (logits(model.double(), folder) for folder in (source, lora))
    base = logits_without(model)

    assert config_of(lora)["r"] == k * r + hybrid_r
    assert float((expected - base).abs().max()) > 1e-2, "an adapter of nothing would prove nothing"
    assert float((expected - actual).abs().max()) <= 1e-6
    check_same_updates(source, lora)


def logits_without(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 43)[None] * 7 % VOCAB_SIZE).logits


@pytest.mark.parametrize("hybrid_r", [0, 3])
def test_peft_computes_the_same_with_what_came_back_from_the_authors_dialect(hybrid_r: int, tmp_path: Path) -> None:
    model = tiny_model("llama")
    source = save_adapter(model, gralora_config("llama", 8, 2, hybrid_r=hybrid_r, alpha=20), tmp_path / "a")
    authors = in_authors_dialect(
        save_adapter(model, gralora_config("llama", 8, 2, hybrid_r=hybrid_r, alpha=20), tmp_path / "authors")
    )
    back = converted(authors, PEFT, tmp_path / "back")

    assert torch.equal(logits(model, source), logits(model, back))
    check_same_updates(authors, converted(authors, LORA, tmp_path / "lora"))


@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "alpha": 7}, {"exclude_modules": ["down_proj"]}], ids=str)
def test_peft_computes_the_same_with_a_lora_as_one_block(options: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model("llama")
    source = save_adapter(model, peft_lora_config("llama", 5, **options), tmp_path / "a")
    blocks = converted(source, PEFT, tmp_path / "blocks")

    expected, actual = (logits(model.double(), folder) for folder in (source, blocks))

    assert (config_of(blocks)["r"], config_of(blocks)["gralora_k"]) == (5, 1)
    assert float((expected - actual).abs().max()) <= 1e-6
    check_same_updates(source, blocks)


@pytest.mark.parametrize("authors", [False, True], ids=["peft", "authors"])
@pytest.mark.parametrize(("r", "k", "hybrid_r"), BLOCKS, ids=str)
def test_between_the_dialects_and_back_is_the_same_checkpoint(
    r: int, k: int, hybrid_r: int, authors: bool, tmp_path: Path
) -> None:
    source = write_gralora(tmp_path / "a", r=r, k=k, hybrid_r=hybrid_r, authors=authors, base_model_name_or_path="m")
    there, here = (PEFT, AUTHORS) if authors else (AUTHORS, PEFT)

    other = converted(source, there, tmp_path / "other")
    back = converted(other, here, tmp_path / "back")
    changed = {key for key, value in config_of(back).items() if config_of(source)[key] != value}

    assert read_whole(other).header.dialect is there
    assert read_whole(source).digest == read_whole(other).digest == read_whole(back).digest
    assert same_bits(tensors_of(source), tensors_of(other))
    assert changed == set()


def test_an_invocation_is_kept_in_every_dialect(tmp_path: Path) -> None:
    """It would be another adapter without it."""
    blocks = write_gralora(tmp_path / "a", alora_invocation_tokens=[5, 6])
    plain = write_lora(tmp_path / "b", alora_invocation_tokens=[5, 6])

    for source, to in ((blocks, AUTHORS), (blocks, LORA), (plain, PEFT), (plain, AUTHORS)):
        written = read_whole(converted(source, to, tmp_path / f"{source.name}-{to}"))

        assert written.header.spec.invocation == (5, 6)
        assert (written.digest == read_whole(source).digest) == (to is AUTHORS and source is blocks)


def test_what_is_written_has_peft_s_names_whatever_they_were(tmp_path: Path) -> None:
    source = write_gralora(tmp_path / "a", hybrid_r=3)
    expected = tensors_of(source)

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            stem, dot, weight = name.removeprefix("base_model.model.").partition(".weight")
            tensors[f"{stem}.default{dot}{weight}"] = tensors.pop(name)

    strange = edit_tensors(source, rename)

    assert not expected.keys() & tensors_of(strange).keys()
    assert same_bits(expected, tensors_of(converted(strange, AUTHORS, tmp_path / "b")))
    check_same_updates(strange, converted(strange, LORA, tmp_path / "c"))


def test_the_authors_count_the_hybrid_rank_into_r(tmp_path: Path) -> None:
    source = write_gralora(tmp_path / "a", r=8, k=2, hybrid_r=4)

    config = config_of(converted(source, AUTHORS, tmp_path / "b"))

    assert (config["r"], config["hybrid_r"], config["gralora_alpha"]) == (12, 4, 16)
    assert not {"alpha", "init_weights", "peft_version"} & config.keys(), "their fork ends with an error at these"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("to", [PEFT, AUTHORS])
def test_a_lora_comes_back_from_one_block_bit_by_bit(to: Dialect, dtype: torch.dtype, tmp_path: Path) -> None:
    def convert_dtype(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()})

    source = edit_tensors(write_lora(tmp_path / "a", r=3), convert_dtype)

    back = converted(converted(source, to, tmp_path / "b"), LORA, tmp_path / "c")

    assert same_bits(tensors_of(source), tensors_of(back))
    assert (config_of(back)["r"], config_of(back)["lora_alpha"]) == (3, 16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_blocks_of_16_bits_stay_so_and_every_value_is_there(dtype: torch.dtype, tmp_path: Path) -> None:
    def convert_dtype(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()})

    source = edit_tensors(write_gralora(tmp_path / "a", r=8, k=4, hybrid_r=2), convert_dtype)
    lora = tensors_of(converted(source, LORA, tmp_path / "b"))

    def values(tensors: dict[str, torch.Tensor], side: str) -> torch.Tensor:
        """All that are not zero, in order."""
        flat = torch.cat([tensor.flatten() for name, tensor in tensors.items() if f"_{side}" in name])
        return flat[flat != 0].sort().values

    assert {tensor.dtype for tensor in lora.values()} == {dtype}
    for side in ("A", "B"):
        assert torch.equal(values(tensors_of(source), side), values(lora, side))


def test_patterns_that_all_modules_agree_in_are_no_obstacle(tmp_path: Path) -> None:
    config = lora_config(r=2, rank_pattern={".*": 4}, alpha_pattern={".*": 6})
    source = write_checkpoint(tmp_path / "a", config, lora_tensors(r=4))

    found = config_of(converted(source, PEFT, tmp_path / "b"))

    assert (found["r"], found["alpha"]) == (4, 6)
    check_same_updates(source, tmp_path / "b")


def test_a_lora_of_several_ranks_is_refused_with_every_reason(tmp_path: Path) -> None:
    tensors = lora_tensors(r=4) | lora_tensors([MODULES[2]], r=8)
    config = lora_config(r=4, rank_pattern={"layers.0.mlp.down_proj": 8}, alpha_pattern={"v_proj": 5})
    source = write_checkpoint(tmp_path / "a", config, tensors)

    with pytest.raises(AdapterConversionError) as caught:
        convert(read_whole(source), PEFT)

    assert caught.value.problems == (
        "gralora has one of them for all modules, and this has ranks 4 (5 modules), 8 (1 modules)",
        "gralora has one of them for all modules, and this has scales 4 (3 modules), 1.25 (2 modules), 2 (1 modules)",
    )


@pytest.mark.parametrize("to", list(Dialect))
def test_what_is_in_that_dialect_already_is_refused(to: Dialect, tmp_path: Path) -> None:
    source = write_lora(tmp_path / "a") if to is LORA else write_gralora(tmp_path / "a", authors=to is AUTHORS)

    with pytest.raises(AdapterConversionError, match=f"it is written as {to} already"):
        convert(read_whole(source), to)


@given(st.floats(1e-6, 1e6), st.integers(1, 4096))
def test_alpha_over_rank_is_the_scale_but_for_a_last_bit(scale: float, rank: int) -> None:
    assert alpha_for(scale, rank) / rank == pytest.approx(scale, rel=2.3e-16, abs=0)


@given(st.integers(1, 512), st.integers(1, 64), st.sampled_from([1, 2, 4, 8]), st.integers(0, 16))
def test_the_usual_alphas_give_the_very_scale(alpha: int, s: int, k: int, hybrid_r: int) -> None:
    scale = alpha / (s * k + hybrid_r)

    found = alpha_for(scale, s * k + hybrid_r)

    assert found / (s * k + hybrid_r) == scale
    assert isinstance(found, int)
