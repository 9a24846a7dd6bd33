"""Synthetic adapters are adapters: PEFT loads them, each is another, and they stay what they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from support.tiny_models import save_tiny_model, tiny_model

from gralora_runtime.adapters.checkpoint.loader import load
from gralora_runtime.errors import ConfigError
from gralora_runtime.model.adaptable import adaptable_modules
from gralora_runtime.model.merging import merge_adapter
from gralora_server.loadtest.headers import num_parameters, num_tied_parameters, shapes_digest, weight_shapes
from gralora_server.loadtest.synthetic import ALL_LINEAR, AdapterKind, make_adapters, parse_kinds

KINDS = [AdapterKind(8, 2), AdapterKind(4, 1), AdapterKind(8, 4, ("q_proj", "v_proj"))]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("synthetic") / "model")


def digests(folder: Path, names: list[str]) -> list[str]:
    shapes = [shape for shape, _ in adaptable_modules(tiny_model("llama"))]
    return [load(name, folder / name, shapes, torch.float32, max_width=256).digest for name in names]


def test_all_are_different_and_all_load(model_dir: Path, tmp_path: Path) -> None:
    names = make_adapters(model_dir, tmp_path, KINDS, 60)

    assert len(set(names)) == 60
    assert len(set(digests(tmp_path, names))) == 60
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


def test_what_is_there_stays_and_more_are_made_the_same_way(model_dir: Path, tmp_path: Path) -> None:
    few = make_adapters(model_dir, tmp_path / "a", KINDS, 3)
    written = [(tmp_path / "a" / name / "adapter_model.safetensors").stat().st_mtime_ns for name in few]

    more = make_adapters(model_dir, tmp_path / "a", KINDS, 9)
    others = make_adapters(model_dir, tmp_path / "b", KINDS, 9)

    assert more[:3] == few
    assert [(tmp_path / "a" / n / "adapter_model.safetensors").stat().st_mtime_ns for n in few] == written
    assert digests(tmp_path / "a", more) == digests(tmp_path / "b", others)
    assert set(make_adapters(model_dir, tmp_path / "b", KINDS, 3, seed=1)).isdisjoint(others)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_peft_reads_the_same_adapter_and_it_matters(model_dir: Path, tmp_path: Path, kind: AdapterKind) -> None:
    (name,) = make_adapters(model_dir, tmp_path, [kind], 1)
    base, ours = tiny_model("llama"), tiny_model("llama")
    shapes = [shape for shape, _ in adaptable_modules(ours)]
    ids = torch.arange(3, 40)[None]

    merge_adapter(ours, load(name, tmp_path / name, shapes, torch.float32, max_width=256))
    with torch.no_grad():
        plain, mine = base(ids).logits, ours(ids).logits
        theirs = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / name)(ids).logits

    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(plain, mine, atol=1e-3)


def test_kinds_are_parsed() -> None:
    assert parse_kinds("r16k2, r8k4:q_proj+v_proj") == [
        AdapterKind(16, 2, ALL_LINEAR),
        AdapterKind(8, 4, ("q_proj", "v_proj")),
    ]


@pytest.mark.parametrize("text", ["", "r16", "r16k0", "r6k4", "lora"])
def test_kinds_that_are_not_understood(text: str) -> None:
    with pytest.raises(ConfigError, match="is not understood"):
        parse_kinds(text)


def test_kinds_that_do_not_fit_the_model(model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="none of the target modules c_attn"):
        make_adapters(model_dir, tmp_path, [AdapterKind(8, 2, ("c_attn",))], 1)
    with pytest.raises(ConfigError, match="k=3 does not divide"):
        make_adapters(model_dir, tmp_path, [AdapterKind(9, 3)], 1)
    with pytest.raises(ConfigError, match=r"no \*\.safetensors"):
        make_adapters(tmp_path, tmp_path, KINDS, 1)


def test_parameters_are_counted_from_headers(model_dir: Path) -> None:
    model = tiny_model("llama")

    tied = model.config.tie_word_embeddings
    expected = sum(p.numel() for name, p in model.named_parameters() if not (tied and name.startswith("lm_head")))
    assert num_parameters(weight_shapes(model_dir)) == expected


def test_a_digest_is_of_the_shapes(model_dir: Path, tmp_path: Path) -> None:
    same, other = save_tiny_model("llama", tmp_path / "same"), save_tiny_model("gpt2", tmp_path / "other")

    assert shapes_digest(model_dir) == shapes_digest(same) != shapes_digest(other)


def test_a_tied_head_is_counted_once_more(model_dir: Path) -> None:
    model = tiny_model("llama")

    tied = model.config.vocab_size * model.config.hidden_size if model.config.tie_word_embeddings else 0
    assert num_tied_parameters(weight_shapes(model_dir)) == tied


def test_a_disk_that_takes_nothing_is_one_error(model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")

    with pytest.raises(ConfigError, match=r"synthetic-0-.* cannot be written"):
        make_adapters(model_dir, tmp_path / "file", KINDS, 1)
