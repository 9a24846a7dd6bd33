"""Which modules a config names: the same as PEFT says, and never at the price of a hung server."""

from __future__ import annotations

from typing import Any

import pytest
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from support.checkpoints import lora_config

from gralora_runtime.adapters.checkpoint.spec import parse_config
from gralora_runtime.adapters.checkpoint.targets import (
    MatchingBudget,
    PatternTable,
    compile_key,
)

NAMES = [
    *(f"model.layers.{i}.self_attn.{p}_proj" for i in (0, 1, 10) for p in "qkvo"),
    *(f"model.layers.{i}.mlp.{p}_proj" for i in (0, 1, 10) for p in ("gate", "up", "down")),
    "model.layers.1.mlp.experts.0.up_proj",
    "model.visual.blocks.1.attn.q_proj",
    "transformer.h.1.attn.c_attn",
    "my_q_proj",
    "q_proj",
]
# What a popular trainer writes for "attention and MLP of the language model".
LONG_PATTERN = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
    r"(?:k_proj|v_proj|q_proj|out_proj|fc1|fc2).*?)|(?:\bmodel\.layers\.[\d]{1,}\."
    r"(?:self_attn|mlp)\.(?:(?:k_proj|v_proj|q_proj|o_proj|gate_proj|up_proj|down_proj)))"
)
CASES: list[dict[str, Any]] = [
    {"target_modules": ["q_proj", "v_proj"]},
    {"target_modules": ["self_attn.q_proj"]},
    {"target_modules": ["model.layers.0.self_attn.q_proj", "up_proj"]},
    {"target_modules": ["proj"]},
    {"target_modules": r".*\.layers\.(0|10)\..*_proj"},
    {"target_modules": r"model\.layers\.\d+\.self_attn\.(q|v)_proj"},
    {"target_modules": "q_proj"},
    {"target_modules": LONG_PATTERN},
    {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 1},
    {"target_modules": ["q_proj", "up_proj", "c_attn"], "layers_to_transform": [0, 10]},
    {"target_modules": ["q_proj", "up_proj", "c_attn"], "layers_to_transform": []},
    {"target_modules": ["q_proj", "c_attn"], "layers_to_transform": [1], "layers_pattern": "layers"},
    {"target_modules": ["q_proj", "c_attn"], "layers_to_transform": [1], "layers_pattern": ["h", "blocks"]},
    {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "blocks|layers"},
    {"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["experts.0.up_proj", "my_q_proj"]},
    {"target_modules": ["q_proj", "up_proj"], "exclude_modules": r".*visual.*"},
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case)[:60])
def test_modules_are_chosen_as_peft_chooses_them(case: dict[str, Any]) -> None:
    config = LoraConfig(**case)
    rule = parse_config("a", lora_config(**case)).targets

    expected = [name for name in NAMES if check_target_module_exists(config, name)]
    actual = [name for name in NAMES if rule.matches(name, MatchingBudget())]

    assert expected == actual


def test_all_linear_is_everything_but_the_output_layer() -> None:
    rule = parse_config("a", lora_config(target_modules="all-linear")).targets

    assert rule.matches("model.layers.0.mlp.up_proj", MatchingBudget())
    assert not rule.matches("lm_head", MatchingBudget())
    assert not rule.matches("model.lm_head", MatchingBudget())
    assert rule.matches("model.my_lm_head", MatchingBudget())


@pytest.mark.parametrize(
    "patterns",
    [
        ["q_proj"],
        ["proj"],
        ["^model.layers.0.self_attn.q_proj"],
        ["layers.1.mlp.up_proj", "up_proj"],
        [r"layers\.\d+\.mlp\..*"],
        ["q_proj|up_proj"],
        ["self_attn"],
        [".*"],
    ],
    ids=str,
)
def test_pattern_keys_match_as_in_peft(patterns: list[str]) -> None:
    values = {pattern: float(i) for i, pattern in enumerate(patterns)}
    table = PatternTable(tuple((compile_key(key, MatchingBudget()), value) for key, value in values.items()))

    for name in NAMES:
        assert values.get(get_pattern_key(patterns, name)) == table.find(name, MatchingBudget())
