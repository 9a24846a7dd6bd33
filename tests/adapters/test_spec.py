"""What a config may ask for, and how much of it is refused, with which words."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from peft import GraloraConfig, LoraConfig
from support.checkpoints import GRALORA_DEFAULTS, LORA_DEFAULTS, MODULES, gralora_config, lora_config

from gralora_runtime.adapters.checkpoint.spec import (
    MAX_PROBLEM_CHARS,
    MAX_PROBLEMS,
    Dialect,
    Part,
    TokenRows,
    parse_config,
)
from gralora_runtime.adapters.checkpoint.targets import MatchingBudget
from gralora_runtime.config import EngineConfig
from gralora_runtime.errors import AdapterRejectedError, ConfigError

Q0 = MODULES[0].name
DOWN0 = MODULES[2].name


def parts(config: dict[str, Any], module: str = Q0) -> tuple[Part, ...]:
    return parse_config("a", config).parts(module, MatchingBudget())


def problems(config: dict[str, Any]) -> str:
    with pytest.raises(AdapterRejectedError) as caught:
        parse_config("a", config)
    return "\n".join(caught.value.problems)


def written_by_peft(config: Any) -> dict[str, Any]:
    """The config as `save_pretrained` would put it into JSON."""
    return {key: list(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}


def test_the_defaults_of_the_installed_peft_are_all_accepted() -> None:
    for config in (GraloraConfig(target_modules=["q_proj"]), LoraConfig(target_modules=["q_proj"])):
        parse_config("a", written_by_peft(config))


def test_our_list_of_peft_defaults_is_the_installed_peft_s() -> None:
    """When PEFT gains a field, this fails, and somebody decides whether the field changes inference."""
    gralora = written_by_peft(GraloraConfig())
    lora = written_by_peft(LoraConfig())

    assert GRALORA_DEFAULTS.keys() == gralora.keys()
    assert LORA_DEFAULTS.keys() == lora.keys()


@pytest.mark.parametrize("absent", ["arrow_config", "kasa_config", "velora_config", "lora_ga_config", "use_bdlora"])
def test_keys_that_older_versions_of_peft_did_not_write_may_be_absent(absent: str) -> None:
    config = lora_config()
    del config[absent]

    assert parse_config("a", config).dialect is Dialect.LORA


def test_peft_gralora_counts_the_hybrid_rank_on_top() -> None:
    expected = (Part(r=8, k=2, scale=24 / 12), Part(r=4, k=1, scale=24 / 12))

    assert expected == parts(gralora_config(r=8, k=2, hybrid_r=4, alpha=24))


def test_the_authors_count_the_hybrid_rank_into_r() -> None:
    config = gralora_config(authors=True) | {"r": 12, "hybrid_r": 4, "gralora_k": 2, "gralora_alpha": 24}

    expected = (Part(r=8, k=2, scale=24 / 12), Part(r=4, k=1, scale=24 / 12))

    assert Dialect.AUTHORS_GRALORA is parse_config("a", config).dialect
    assert expected == parts(config)


def test_without_a_hybrid_part_there_is_one_part() -> None:
    assert (Part(r=8, k=4, scale=2.0),) == parts(gralora_config(r=8, k=4, alpha=16))


@pytest.mark.parametrize("alphas", [{"alpha": 16, "gralora_alpha": 16}, {}], ids=["both", "neither"])
def test_a_config_in_no_dialect_or_in_two_is_refused(alphas: dict[str, int]) -> None:
    config = gralora_config()
    del config["alpha"]

    assert "exactly one must be present" in problems(config | alphas)


def test_rslora_scales_by_the_square_root() -> None:
    assert (Part(r=4, k=1, scale=16 / 2),) == parts(lora_config(r=4, lora_alpha=16, use_rslora=True))
    assert (Part(r=4, k=1, scale=16 / 4),) == parts(lora_config(r=4, lora_alpha=16))


def test_patterns_choose_rank_and_alpha_of_each_module() -> None:
    config = lora_config(
        r=4, lora_alpha=16, rank_pattern={"layers.0.mlp.down_proj": 2, "q_proj": 8}, alpha_pattern={r"mlp\.\w+_proj": 6}
    )

    assert (Part(r=2, k=1, scale=6 / 2),) == parts(config, DOWN0)
    assert (Part(r=8, k=1, scale=16 / 8),) == parts(config, Q0)
    assert (Part(r=4, k=1, scale=6 / 4),) == parts(config, "model.layers.1.mlp.down_proj")


def test_an_invocation_is_read_and_told_of() -> None:
    for make, told in ((lora_config, "base model's"), (gralora_config, "(PEFT does not know this of a GraLoRA)")):
        spec = parse_config("a", make(alora_invocation_tokens=[5, 0, 5]))
        (note,) = spec.notes

        assert spec.invocation == (5, 0, 5)
        assert note.startswith("its config has alora_invocation_tokens: [5, 0, 5], from whose last place in a prompt")
        assert note.endswith(told)


@pytest.mark.parametrize("off", [None, [], False], ids=repr)
def test_without_an_invocation_it_is_a_plain_lora_as_to_peft(off: object) -> None:
    assert parse_config("a", lora_config(alora_invocation_tokens=off)) == parse_config("a", lora_config())


INVOCATIONS = [
    (5, "alora_invocation_tokens: 5 is not a list of 1 to 1024 token ids"),
    ("assistant", "alora_invocation_tokens: 'assistant' is not a list"),
    ([1] * 1025, "alora_invocation_tokens: [1, 1, "),
    ([5, -1], "alora_invocation_tokens[1]: -1 is not a token id"),
    ([5.0], "alora_invocation_tokens[0]: 5.0 is not a token id"),
    ([1, True], "alora_invocation_tokens[1]: True is not a token id"),
    ([1 << 40], f"alora_invocation_tokens[0]: {1 << 40} is not a token id"),
    ([[5]], "alora_invocation_tokens[0]: [5] is not a token id"),
]


@pytest.mark.parametrize(("value", "told"), INVOCATIONS, ids=[told for _, told in INVOCATIONS])
def test_an_invocation_that_is_none_is_refused_with_its_value(value: object, told: str) -> None:
    for make in (lora_config, gralora_config):
        assert problems(make(alora_invocation_tokens=value)).startswith(told)


def test_the_first_pattern_that_matches_wins() -> None:
    config = lora_config(rank_pattern={"self_attn.q_proj": 2, "q_proj": 3})

    assert parts(config, Q0)[0].r == 2
    assert parts(config, "q_proj")[0].r == 3


REFUSED = {
    "layer_replication": [[0, 2], [1, 3]],
    "megatron_config": {"a": 1},
    "use_qalora": True,
    "use_bdlora": {"nblocks": 2},
    "arrow_config": {"top_k": 3},
    "kasa_config": {"beta": 1e-4},
    "monteclora_config": {"num_samples": 8},
    "velora_config": {"num_groups": 64},
    "a_key_from_the_future": 7,
    "bias": "gralora_only",
    "task_type": "SEQ_CLS",
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_we_do_not_implement_is_refused_with_its_value(key: str) -> None:
    told = problems(lora_config(**{key: REFUSED[key]}))

    assert told.startswith(f"{key}: {REFUSED[key]!r}")
    assert "\n" not in told


def test_all_reasons_are_told_at_once() -> None:
    told = problems(lora_config(**REFUSED, r=0, lora_alpha=math.inf)).splitlines()

    assert {line.split(":")[0] for line in told} == {*REFUSED, "r", "lora_alpha"}


def test_a_long_list_of_reasons_is_cut_and_counted() -> None:
    told = problems(lora_config(**{f"new_{i}": i + 1 for i in range(MAX_PROBLEMS + 3)})).splitlines()

    assert len(told) == MAX_PROBLEMS + 1
    assert told[-1] == "and 3 more problems"


@pytest.mark.parametrize("inert", [None, False, {}, [], ""], ids=repr)
def test_an_unknown_key_that_is_switched_off_is_accepted(inert: object) -> None:
    for make in (lora_config, gralora_config):
        assert parse_config("a", make(a_key_from_the_future=inert)).notes == ()


@pytest.mark.parametrize("value", [7, 0, 0.0, True, "x", [None], {"a": False}], ids=repr)
def test_an_unknown_key_needs_an_operator_s_word(value: object) -> None:
    """The refusal names the option that passes over it; then it is served, and told of."""
    for make in (lora_config, gralora_config):
        config = make(a_key_from_the_future=value)
        told = problems(config)
        spec = parse_config("a", config, ["another", "a_key_from_the_future"])

        assert told.startswith(f"a_key_from_the_future: {value!r} is not known here")
        assert "--allow-unknown-config-key a_key_from_the_future passes over it" in told
        (note,) = spec.notes
        assert note.startswith(f"its config has a_key_from_the_future: {value!r}, which is not known here")
        assert replace(spec, notes=()) == parse_config("a", make())


def test_a_key_of_a_million_letters_is_not_told_twice() -> None:
    (told,) = problems(lora_config(**{"x" * 1_000_000: 1})).splitlines()

    assert len(told) <= MAX_PROBLEM_CHARS


@pytest.mark.parametrize("key", ["use_qalora", "bias", "layer_replication"])
def test_a_key_that_is_known_is_refused_whatever_an_operator_says(key: str) -> None:
    with pytest.raises(AdapterRejectedError, match=f"{key}: .* is not supported"):
        parse_config("a", lora_config(**{key: REFUSED[key]}), [key])
    with pytest.raises(ConfigError, match=f"allow_unknown_config_keys has {key}, which is known"):
        EngineConfig(model=Path("/m"), allow_unknown_config_keys=("stamp", key))


LORA_ALONE = ("lora_alpha", "use_rslora", "exclude_modules", "init_lora_weights", "target_parameters")


@pytest.mark.parametrize(
    ("key", "make"),
    [
        *((key, gralora_config) for key in LORA_ALONE),
        *((key, lora_config) for key in ("alpha", "gralora_k", "hybrid_r", "gralora_dropout")),
    ],
)
def test_a_key_of_the_other_dialect_is_known_and_refused(key: str, make: Callable[..., dict[str, Any]]) -> None:
    assert problems(make(**{key: "x"})) == f"{key}: 'x' is not supported in a config of this peft_type"


STAMPS = {"unsloth_fixed": True, "unsloth_version": "2026.3", "lorap_emb_lr": 1e-6, "transformers_version": "5.1"}


@pytest.mark.parametrize("key", STAMPS)
def test_the_mark_of_another_trainer_is_told_of(key: str) -> None:
    for make in (lora_config, gralora_config):
        (note,) = parse_config("a", make(**{key: STAMPS[key]})).notes

        assert note.startswith(f"its config has {key}: {STAMPS[key]!r}, ")
        assert parse_config("a", make(**{key: None})).notes == ()


@pytest.mark.parametrize("names", [["score"], ["classifier", "score"], ["qa_outputs"]])
def test_modules_of_other_tasks_that_no_causal_lm_has_are_told_of(names: list[str]) -> None:
    """PEFT wraps what it finds of them: here nothing."""
    (note,) = parse_config("a", lora_config(modules_to_save=names)).notes

    assert note.startswith(f"its config has modules_to_save: {names!r}, which are modules of other tasks")


def test_modules_that_a_causal_lm_has_are_saved_and_others_are_not_looked_for() -> None:
    for make in (lora_config, gralora_config):
        spec = parse_config("a", make(modules_to_save=["embed_tokens", "score", "norm"]))

        assert spec.saved == ("embed_tokens", "norm")
        assert spec.notes == ()


@pytest.mark.parametrize("names", ["score", [1], [["score"]], {"score": 1}, [""], 3])
def test_modules_to_save_that_are_no_names_are_refused(names: object) -> None:
    assert problems(lora_config(modules_to_save=names)) == f"modules_to_save: {names!r} is not a list of modules' names"


def test_tokens_are_of_the_embedding_or_of_modules_by_name() -> None:
    assert parse_config("a", lora_config(trainable_token_indices=[7, 5])).token_rows == (TokenRows("", (7, 5)),)
    assert parse_config("a", lora_config(trainable_token_indices={"lm_head": [3]})).token_rows == (
        TokenRows("lm_head", (3,)),
    )
    assert parse_config("a", lora_config(trainable_token_indices=[])).token_rows == ()


TOKENS = [
    (5, "trainable_token_indices: 5 is not a list of token ids"),
    ([-1], "trainable_token_indices: [-1] is not a list of token ids"),
    ([True], "trainable_token_indices: [True] is not a list of token ids"),
    ([1 << 31], "trainable_token_indices: [2147483648] is not a list of token ids"),
    ({"lm_head": []}, "trainable_token_indices['lm_head']: [] is not a list of token ids"),
    ([4, 9, 4], "trainable_token_indices: [4, 9, 4] names a token twice"),
]


@pytest.mark.parametrize(("value", "told"), TOKENS, ids=[told for _, told in TOKENS])
def test_tokens_that_are_none_are_refused_with_their_value(value: object, told: str) -> None:
    assert problems(lora_config(trainable_token_indices=value)) == told


@pytest.mark.parametrize("key", ["modules_to_save", "trainable_token_indices"])
def test_what_applies_from_the_first_token_on_is_refused_beside_an_invocation(key: str) -> None:
    value = {"modules_to_save": ["norm"], "trainable_token_indices": [3]}[key]

    told = problems(lora_config(**{key: value}, alora_invocation_tokens=[5]))

    assert told == f"{key}: {value!r} is not supported beside alora_invocation_tokens"


def test_a_gralora_has_no_tokens_of_its_own() -> None:
    """Nor PEFT's: it would pass over the key."""
    told = problems(gralora_config(trainable_token_indices=[3]))

    assert told == "trainable_token_indices: [3] is not supported in a config of this peft_type"


PARAMETERS = ["experts.down_proj"]


@pytest.mark.parametrize("modules", [None, []])
def test_parameters_need_no_module_beside_them(modules: object) -> None:
    targets = parse_config("a", lora_config(target_modules=modules, target_parameters=PARAMETERS)).targets

    assert targets.matches_parameter("model.layers.0.mlp.experts.down_proj")
    assert not targets.matches_parameter("model.layers.0.mlp.other_experts.down_proj")
    assert not targets.matches("model.layers.0.mlp.experts.down_proj", MatchingBudget())


def test_without_modules_and_parameters_nothing_is_named() -> None:
    told = problems(lora_config(target_modules=None, target_parameters=[]))

    assert told == "target_modules: None names no module"


@pytest.mark.parametrize("value", ["experts.down_proj", [1], {"experts.down_proj": 1}], ids=repr)
def test_parameters_that_are_no_list_of_strings_are_refused_as_peft_does(value: object) -> None:
    assert problems(lora_config(target_parameters=value)) == f"target_parameters: {value!r} is not a list of strings"


@pytest.mark.parametrize(
    ("key", "value"),
    [("use_dora", True), ("lora_bias", True), ("fan_in_fan_out", True), ("alora_invocation_tokens", [5])],
)
def test_what_peft_refuses_beside_parameters_is_refused(key: str, value: object) -> None:
    told = problems(lora_config(target_parameters=PARAMETERS, **{key: value}))

    assert told == f"{key}: {value!r} is not supported beside target_parameters"


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "Gaussian", "eva", "orthogonal", "mica"])
def test_initialisations_that_leave_the_base_weights_alone_are_accepted(init: object) -> None:
    assert parse_config("a", lora_config(init_lora_weights=init)).notes == ()


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "OLoRA", "corda", "loftq", "lora_ga", "new", 1])
def test_initialisations_that_change_the_base_weights_are_refused(init: object) -> None:
    """PEFT rewrites such a config to True when it converts the adapter to one for the original weights."""
    told = problems(lora_config(init_lora_weights=init))

    assert told.startswith(f"init_lora_weights: {init!r} trains against changed base weights")
    assert "model.save_pretrained(OUT, path_initial_model_for_weight_conversion=FIRST)" in told


def test_settings_of_an_initialisation_that_is_not_used_do_not_matter() -> None:
    parse_config(
        "a", lora_config(eva_config={"rho": 2.0}, loftq_config={"loftq_bits": 4}, corda_config={"verbose": True})
    )


@pytest.mark.parametrize("noise", ["gralora_dropout", "base_model_name_or_path", "revision", "auto_mapping"])
def test_what_is_only_about_training_or_origin_is_ignored(noise: str) -> None:
    parse_config("a", gralora_config(**{noise: "anything"}))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"r": 0}, "r: 0"),
        ({"r": -8}, "r: -8"),
        ({"r": 8.0}, "r: 8.0"),
        ({"r": True}, "r: True"),
        ({"r": "8"}, "r: '8'"),
        ({"r": 1 << 40}, "r: "),
        ({"gralora_k": 3}, "gralora_k: 3 does not divide"),
        ({"gralora_k": 0}, "gralora_k: 0"),
        ({"hybrid_r": -1}, "hybrid_r: -1"),
        ({"hybrid_r": None}, "hybrid_r: None"),
        ({"alpha": math.nan}, "alpha: nan"),
        ({"alpha": math.inf}, "alpha: inf"),
        ({"alpha": 10**400}, "alpha: 1000"),
        ({"alpha": 1e300}, "too large for float32"),
        ({"alpha": "16"}, "alpha: '16'"),
        ({"target_modules": None}, "target_modules: None names no module"),
        ({"target_modules": []}, "target_modules: [] names no module"),
        ({"target_modules": [1]}, "target_modules: [1]"),
        ({"target_modules": "("}, "target_modules: '(' is not a regular expression"),
        ({"target_modules": ".*", "layers_to_transform": [0]}, "layers_to_transform: [0] needs"),
        ({"layers_to_transform": ["0"]}, "layers_to_transform: '0'"),
        ({"layers_pattern": 3}, "layers_pattern: 3"),
        ({"exclude_modules": ["q_proj"]}, "exclude_modules: ['q_proj'] is not supported"),
        ({"use_dora": True}, "use_dora: True"),
        ({"bias": "lora_only"}, "bias: 'lora_only' is not supported (none, gralora_only, all are)"),
    ],
    ids=str,
)
def test_gralora_values_are_validated(changes: dict[str, Any], told: str) -> None:
    assert told in problems(gralora_config(**changes))


def test_dora_has_no_biases_of_b_beside_it() -> None:
    assert "lora_bias: True is not supported beside use_dora" in problems(lora_config(use_dora=True, lora_bias=True))


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (lora_config(use_dora=True), "alora_invocation_tokens: [1, 2] is not supported beside use_dora"),
        (lora_config(bias="lora_only"), "bias: 'lora_only' is not supported beside alora_invocation_tokens"),
        (gralora_config(bias="all"), "bias: 'all' is not supported beside alora_invocation_tokens"),
    ],
    ids=["dora", "lora", "gralora"],
)
def test_what_tokens_before_the_invocation_would_have_too_is_refused(config: dict[str, Any], told: str) -> None:
    assert told in problems(config | {"alora_invocation_tokens": [1, 2]})
    parse_config("a", config)


def test_the_authors_hybrid_rank_must_leave_room_for_blocks() -> None:
    assert "leaves no rank" in problems(gralora_config(authors=True) | {"r": 8, "hybrid_r": 8})
    assert "does not divide" in problems(gralora_config(authors=True, k=4) | {"r": 8, "hybrid_r": 2})


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern['q_proj']: 0"),
        ({"rank_pattern": {"q_proj": 2.5}}, "rank_pattern['q_proj']: 2.5"),
        ({"rank_pattern": [1]}, "rank_pattern: [1] is not an object"),
        ({"rank_pattern": {"(": 2}}, "is not a regular expression"),
        ({"rank_pattern": {"(?i)q_proj": 2}}, "is not a regular expression"),
        ({"alpha_pattern": {"q_proj": math.nan}}, "alpha_pattern['q_proj']: nan"),
        ({"alpha_pattern": {"q_proj": True}}, "alpha_pattern['q_proj']: True"),
        ({"alpha_pattern": {"(a+": 2}}, "is not a regular expression"),
        ({"alpha_pattern": {f"m{i}": 2 for i in range(8193)}}, "8193 patterns are too many"),
        ({"use_rslora": 1}, "use_rslora: 1"),
        ({"layers_pattern": "(?P<layer_number>x)", "layers_to_transform": 0}, "is not a regular expression"),
    ],
    ids=str,
)
def test_lora_values_are_validated(changes: dict[str, Any], told: str) -> None:
    assert told in problems(lora_config(**changes))


def test_absent_patterns_may_be_null() -> None:
    assert (Part(r=4, k=1, scale=4.0),) == parts(lora_config(rank_pattern=None, alpha_pattern=None))


@pytest.mark.parametrize("peft_type", ["VERA", "IA3", "gralora", None, ["LORA"], 3])
def test_other_peft_types_are_refused(peft_type: object) -> None:
    assert f"peft_type: {peft_type!r} is not supported" in problems({**lora_config(), "peft_type": peft_type})


def test_an_empty_config_is_refused() -> None:
    assert "peft_type: None" in problems({})
