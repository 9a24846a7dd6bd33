"""What is odd about an adapter is said in sentences; what is usual raises no doubts."""

from __future__ import annotations

import pytest
import torch

from gralora_runtime.adapters.checkpoint.doubts import about_names, about_weights, beyond
from gralora_runtime.adapters.checkpoint.update import LowRank, Update, norm


def update(*, seed: int = 0, a: float = 1.0, b: float = 1.0, scale: float = 1.0) -> Update:
    generator = torch.Generator().manual_seed(seed)
    one = torch.randn(2, 12, 4, generator=generator) * a
    return (LowRank(one, torch.randn(2, 4, 8, generator=generator) * b, scale),)


NOTHING = ["it changes nothing: in every module A, B or the scale is zero, as B is before any training"]


@pytest.mark.parametrize("zero", [{"a": 0.0}, {"b": 0.0}, {"scale": 0.0}], ids=str)
def test_an_adapter_of_zeros_changes_nothing(zero: dict[str, float]) -> None:
    assert about_weights({"m.0": update(**zero), "m.1": update(b=0.0)}, {"m.0": 1.0, "m.1": 0.0}) == NOTHING


def test_one_module_that_changes_something_is_enough() -> None:
    assert about_weights({"m.0": update(b=0.0), "m.1": update()}, {}) == []


def test_a_hybrid_changes_something_by_either_pair() -> None:
    (still,), (moving,) = update(b=0.0), update()

    assert about_weights({"m": (still, moving)}, {}) == []


def test_ten_times_the_weights_norm_is_told_and_less_is_not() -> None:
    updates = {f"m.{index}": update(seed=index) for index in range(5)}
    sizes = {module: norm(one) for module, one in updates.items()}

    assert about_weights(updates, {module: size / 9.9 for module, size in sizes.items()}) == []
    assert about_weights(updates, {"m.3": sizes["m.3"] / 20}) == [
        "in 1 of 1 modules it adds more than 10 times the weight's own norm: m.3 (20 times)"
    ]


def test_the_worst_three_are_named_and_the_rest_is_counted() -> None:
    updates = {f"m.{index}": update(seed=index) for index in range(6)}
    base_norms = {f"m.{index}": norm(updates[f"m.{index}"]) / (8 * (index + 1)) for index in range(6)}

    (found,) = about_weights(updates, base_norms)

    assert found.startswith("in 5 of 6 modules it adds more than 10 times the weight's own norm: ")
    assert found.endswith(": m.5 (48 times), m.4 (40 times), m.3 (32 times), and 2 more")


@pytest.mark.parametrize("huge", [{"a": 1e30, "b": 1e30}, {"a": 3e38}], ids=str)
def test_what_float32_does_not_hold_is_far_outside(huge: dict[str, float]) -> None:
    assert "m (inf times)" in about_weights({"m": update(**huge)}, {"m": 1.0})[0]


def test_a_weight_of_zeros_is_no_division_by_zero() -> None:
    assert "m (inf times)" in about_weights({"m": update()}, {"m": 0.0})[0]
    assert about_weights({"m": update(b=0.0), "n": update()}, {"m": 0.0}) == []


@pytest.mark.parametrize(
    ("trained_for", "served"),
    [
        ("", "m"),
        ("m", ""),
        ("owner/M-135m", "m-135M"),
        ("/models/m/", "m"),
        ("m", "m"),
        ("owner/m", "0123456789abcdef" * 2 + "01234567"),
        ("snapshots/" + "A" * 40, "m"),
    ],
)
def test_names_that_agree_or_are_not_known_raise_no_doubts(trained_for: str, served: str) -> None:
    assert about_names(trained_for, served) == []


def test_a_module_is_beyond_if_its_bound_is_above_ten_times_a_norm_that_is_known() -> None:
    bounds = {"m.0": 10.0, "m.1": 10.1, "m.2": float("inf"), "m.3": 0.0, "m.4": 1e9}

    assert beyond(bounds, {"m.0": 1.0, "m.1": 1.0, "m.2": 1e30, "m.3": 0.0}) == {"m.1", "m.2"}


def test_another_name_is_told() -> None:
    assert about_names("owner/other", "m") == [
        "its config names the base model 'owner/other', and this one is called 'm'"
    ]
