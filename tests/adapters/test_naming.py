"""Names of tensors that PEFT would have spelled otherwise: mapped where one module fits, and told; else refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.checkpoints import MODULES, edit_tensors, write_gralora, write_lora
from torch import Tensor

from gralora_runtime.adapters.checkpoint.header import inspect
from gralora_runtime.adapters.checkpoint.loader import load
from gralora_runtime.adapters.checkpoint.naming import Naming, as_peft_names, naming_for, take_apart
from gralora_runtime.adapters.checkpoint.spec import ModuleShape

Q0 = "model.layers.0.self_attn.q_proj"
NAMES = {module.name for module in MODULES}
WRAPPED = [
    ModuleShape(module.name.replace("model.", "model.language_model."), module.in_features, module.out_features)
    for module in MODULES
]

# How a name of PEFT's is spelled by others, and what is said of it.
SPELLINGS: dict[str, tuple[Callable[[str], str], list[str]]] = {
    "peft": (str, []),
    "own name": (
        lambda name: re.sub(r"_(A|B|A_general|B_general)((?:\.weight)?)$", r"_\1.mine\2", name),
        ["the adapter's own name, 'mine', stands in them"],
    ),
    "no beginning": (
        lambda name: name.removeprefix("base_model.model."),
        ["base_model.model. does not stand before them"],
    ),
    "in a wrapper": (
        lambda name: name.replace(".model.layers", ".model.language_model.layers"),
        ["what is model.language_model.* in the model that it was trained in is model.* in this one"],
    ),
    "in an older wrapper": (
        lambda name: name.replace(".model.layers", ".language_model.model.layers"),
        ["what is language_model.* in the model that it was trained in is * in this one"],
    ),
    "in another wrapper": (
        lambda name: name.replace(".model.layers", ".model.text_model.layers"),
        ["what is model.text_model.* in the model that it was trained in is model.* in this one"],
    ),
}


def respelled(folder: Path, spell: Callable[[str], str], *, also: bool = False, only: str = "") -> Path:
    """`also`: the names as they were stay, too. `only`: of tensors whose name has it."""

    def change(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if only in name]:
            tensors[spell(name)] = tensors[name].clone() if also else tensors.pop(name)

    return edit_tensors(folder, change)


@pytest.mark.parametrize("case", SPELLINGS)
@pytest.mark.parametrize("kind", ["lora", "hybrid"])
def test_a_strange_spelling_is_the_same_adapter_and_is_told(tmp_path: Path, kind: str, case: str) -> None:
    spell, told = SPELLINGS[case]
    for name in ("usual", "strange"):
        if kind == "lora":
            write_lora(tmp_path / name)
        else:
            write_gralora(tmp_path / name, hybrid_r=3)
    strange = respelled(tmp_path / "strange", spell)

    usual, loaded = (load(name, tmp_path / name, MODULES, torch.float32, max_width=64) for name in ("usual", "strange"))

    assert inspect(strange).fits(MODULES) == []
    assert usual.digest == loaded.digest
    assert torch.equal(usual.blob, loaded.blob)
    assert told == inspect(strange).naming(MODULES).told()


def test_two_deviations_at_once_are_told_one_by_one(tmp_path: Path) -> None:
    spell = lambda name: SPELLINGS["own name"][0](SPELLINGS["no beginning"][0](name))  # noqa: E731
    header = inspect(respelled(write_lora(tmp_path / "a"), spell))

    assert header.fits(MODULES) == []
    assert len(header.naming(MODULES).told()) == 2
    assert header.targets == tuple(sorted(NAMES))


def test_patterns_of_a_config_speak_of_the_model_that_it_was_trained_in(tmp_path: Path) -> None:
    config = {
        "target_modules": r"model\.language_model\..*(q_proj|v_proj|down_proj)",
        "rank_pattern": {"language_model.layers.1.mlp.down_proj": 2},
    }
    folder = write_lora(tmp_path / "a", WRAPPED[:5], **config)
    down = ModuleShape(WRAPPED[5].name, 48, 32)
    narrow = write_lora(tmp_path / "b", [down], r=2)
    small = {name: inspect(narrow).tensors[name].shape for name in inspect(narrow).tensors}
    edit_tensors(folder, lambda tensors: tensors.update({name: torch.ones(shape) for name, shape in small.items()}))

    header = inspect(folder)

    assert header.fits(MODULES) == []
    assert {module.module.name: module.parts[0].part.r for module in header.plan(MODULES)} == {
        name: 2 if "layers.1.mlp" in name else 4 for name in NAMES
    }


def test_a_base_model_that_has_such_paths_itself_needs_no_mapping(tmp_path: Path) -> None:
    header = inspect(write_lora(tmp_path / "a", WRAPPED))

    assert header.fits(WRAPPED) == []
    assert header.naming(WRAPPED).told() == []


@pytest.mark.parametrize(
    ("path", "modules", "theirs"),
    [
        ("language_model.model.x", ["model.x", "y.x"], "language_model."),
        ("language_model.model.x", ["model.x", "language_model.model.x"], ""),
        ("model.language_model.x", ["model.x"], "model.language_model."),
        ("model.language_model.x", ["y.x", "language_model.x", "x"], ""),
        ("vision_model.x", ["model.x"], ""),
    ],
)
def test_one_module_fits_or_none(path: str, modules: list[str], theirs: str) -> None:
    """A module of that very path comes before all; one that merely ends so is none."""
    assert naming_for([f"base_model.model.{path}.lora_A.weight"], modules) == Naming(
        ours="model." if theirs.startswith("model.") else "", theirs=theirs
    )


@pytest.mark.parametrize("case", ["own name", "no beginning", "in a wrapper"])
def test_two_tensors_for_one_matrix_are_refused(tmp_path: Path, case: str) -> None:
    folder = respelled(write_lora(tmp_path / "a"), SPELLINGS[case][0], also=True, only=Q0)

    told = inspect(folder).fits(MODULES)

    assert told
    assert all("spelled in another way" in problem or "is missing" in problem for problem in told)
    assert sum("spelled in another way" in problem for problem in told) >= 2


def test_an_adapter_for_other_layers_shows_two_names_of_each_side(tmp_path: Path) -> None:
    other = [ModuleShape(f"transformer.h.{layer}.attn.c_attn", 32, 96) for layer in range(3)]
    (told, *_) = inspect(write_lora(tmp_path / "a", other, target_modules=["c_attn"])).fits(MODULES)

    assert told == (
        "it matches no module of the base model: its tensors are called "
        "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight and "
        "base_model.model.transformer.h.1.attn.c_attn.lora_A.weight, "
        f"the model's layers {MODULES[0].name} and {MODULES[1].name}"
    )


def test_tensors_of_an_encoder_of_images_fit_nowhere(tmp_path: Path) -> None:
    """The language model's do, but an adapter is served whole or not at all."""
    folder = write_lora(tmp_path / "a", WRAPPED)
    seeing = "base_model.model.model.vision_tower.layers.0.q_proj.lora_A.weight"
    edit_tensors(folder, lambda tensors: tensors.update({seeing: torch.zeros(4, 32)}))

    assert inspect(folder).fits(MODULES) == [
        f"tensor {seeing}: the base model has no layer model.vision_tower.layers.0.q_proj for it"
    ]


@given(
    modules=st.lists(
        st.lists(st.sampled_from(["model", "language_model", "text_model", "x"]), min_size=1, max_size=5).map(".".join),
        min_size=1,
        max_size=8,
        unique=True,
    ),
    prefix=st.sampled_from(["base_model.model.", ""]),
    wrapper=st.sampled_from(
        [("", ""), ("model.", "model.language_model."), ("", "language_model."), ("model.", "model.text_model.")]
    ),
    adapter=st.sampled_from(["", "default", "weight"]),
)
def test_a_spelling_gives_no_two_modules_one_name(
    modules: list[str], prefix: str, wrapper: tuple[str, str], adapter: str
) -> None:
    naming = Naming(prefix=prefix, ours=wrapper[0], theirs=wrapper[1], adapter=adapter)
    matrices = ("lora_A.weight", "lora_B.weight", "gralora_A", "gralora_A_general.weight")

    names = {naming.tensor(naming.path(module), matrix) for module in modules for matrix in matrices}

    assert len(names) == len(modules) * len(matrices)
    for name in names:
        taken = take_apart(name)
        assert taken is not None
        assert (taken.adapter, taken.matrix in matrices, naming.module(taken) in modules) == (adapter, True, True)


@pytest.mark.parametrize("case", ["own name", "no beginning", "peft"])
def test_a_strange_name_has_one_that_is_peft_s(case: str) -> None:
    for matrix in ("lora_A.weight", "gralora_B", "gralora_B_general.weight"):
        name = f"base_model.model.{Q0}.{matrix}"
        assert as_peft_names(SPELLINGS[case][0](name)) == name
    assert as_peft_names("base_model.model.lm_head.weight") == "base_model.model.lm_head.weight"
