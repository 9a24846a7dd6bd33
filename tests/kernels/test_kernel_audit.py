"""The Triton kernels without a GPU: compiled for four machines, without a spill, and moving no byte too many."""

from __future__ import annotations

import importlib.util

import pytest

pytestmark = [
    pytest.mark.alone,  # one compiling process for each core
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
]


@pytest.fixture(scope="module")
def binaries():
    """bf16 for every target and fp32 for one; `make kernel-audit` has all, and fp16, which compiles like bf16."""
    import torch
    from kernel_audit import compile_all

    return compile_all([torch.bfloat16]) + compile_all([torch.float32], ["sm_90"])


def test_every_variant_meets_the_audits_requirements(binaries):
    """No spills, matrix instructions, loads of 16 bytes, and the same instruction in every variant of a family."""
    from kernel_audit import failures

    assert failures(binaries, []) == []


def test_every_kernel_is_audited(binaries):
    from kernel_binary import TARGETS

    kinds = {"shrink", "expand", "norm", "rotary", "attention", "silu", "gelu_tanh", "squared_relu alone", "linear"}
    kinds |= {"sampling", "follow", "look up"}
    for target in TARGETS:
        assert {b.variant.split(",")[0] for b in binaries if b.target == target} == kinds
    assert {"b_x", "b_a", "b_b", "b_old", "b_k", "b_v"} <= {name for b in binaries for name in b.wide_loads}


def test_launches_and_bytes_meet_the_audits_requirements():
    from kernel_audit import count_all, failures

    steps = count_all()

    assert failures([], steps) == []
    for gralora, lora in zip(steps[::2], steps[1::2], strict=True):
        assert (gralora.adapter, lora.adapter) == ("GraLoRA r=16 k=2", "exact LoRA r=32")
        assert gralora.minimum < lora.minimum


def test_the_audit_names_what_fails():
    from dataclasses import replace

    from kernel_audit import count_all, failures
    from kernel_binary import Binary

    good = Binary(
        variant="shrink", family="adapters", target="sm_80", dtype="bf16", is_product=True, wide_loads=("b_x", "b_a"),
        registers=40, spilled_bytes=0, shared_bytes=0, matrix_instructions=("HMMA",), load_bytes={"b_x": 16, "b_a": 16},
    )  # fmt: skip
    step = count_all()[0]

    assert failures([good], [step]) == []
    for broken, message in (
        (replace(good, spilled_bytes=8), "spills 8 bytes"),
        (replace(good, matrix_instructions=()), "uses no matrix instruction"),
        (replace(good, load_bytes={"b_x": 16, "b_a": 2}), "less than 16 bytes: {'b_a': 2}"),
        (replace(good, load_bytes={"b_x": 16}), "less than 16 bytes: {'b_a': 0}"),
    ):
        assert message in failures([broken], [])[0]
    assert "different matrix instructions" in failures([good, replace(good, matrix_instructions=("HGMMA",))], [])[0]
    assert "launches for 4 groups" in failures([], [replace(step, launches=9)])[0]
    assert "moves" in failures([], [replace(step, distinct=2 * step.minimum)])[0]
    assert "requests" in failures([], [replace(step, requested=2 * step.minimum)])[0]
