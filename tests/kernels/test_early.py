"""Kernels that are set up while the one before them still runs touch no memory before it has ended."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

pytest.importorskip("triton")

# In a process of its own: Triton lets nobody change what compiled kernels were made with.
COMPILE = """
import sys; sys.path.insert(0, "scripts")
import torch
import triton.language as tl
from gralora_kernels.triton_ops import early
early.IS_EARLY = tl.constexpr(True)
import kernel_binary
for variant in {variant.function: variant for variant in kernel_binary.variants(torch.bfloat16)}.values():
    compiled = kernel_binary.compile_for(variant, kernel_binary.TARGETS["sm_90"])
    print("KERNEL", variant.function.__name__)
    print(compiled.asm["ptx"])
"""
EARLY = {"norm_kernel", "rotate_and_store_kernel", "attention_kernel", "merge_kernel", "activation_kernel"}
EARLY |= {"scan_kernel", "weigh_kernel", "gather_kernel", "choose_kernel", "tops_kernel", "report_kernel"}


def test_nothing_is_read_or_written_before_the_kernel_before_has_ended():
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, check=True)

    kernels = dict(kernel.split("\n", 1) for kernel in done.stdout.split("KERNEL ")[1:])
    assert len(kernels) > len(EARLY)
    assert {name for name, ptx in kernels.items() if "griddepcontrol.wait" in ptx} == EARLY
    for name in EARLY:
        before, after = kernels[name].split("griddepcontrol.wait", 1)
        touched = re.compile(r"^\s*(?:@%p\d+ )?(?:ld|st|cp\.async)\S*\.global", re.MULTILINE)
        assert touched.search(before) is None, name
        assert touched.search(after), f"{name}: this test could not fail"
