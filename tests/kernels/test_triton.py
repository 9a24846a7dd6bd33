"""The Triton kernels without a GPU: right under the interpreter, and compiled for three machines without a spill."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.numeric import BOUNDS

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def interpreted():
    """The interpreter is switched on when triton is imported, so it gets its own process."""
    paths = [str(HERE.parent), *filter(None, sys.path)]
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [sys.executable, str(HERE / "triton_interpreter.py")], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_agrees_with_the_reference_under_the_interpreter(interpreted):
    wrong = {case: error for case, error in interpreted["errors"].items() if not error <= BOUNDS[torch.float32]}

    assert wrong == {}
    assert len(interpreted["errors"]) > 20


def test_base_model_rows_are_untouched_under_the_interpreter(interpreted):
    assert interpreted["base_untouched"]


def compile_kernel(kernel, constants, dtype, target):
    """As the JIT would: pointers and sizes are multiples of 16."""
    import triton
    from triton.compiler import ASTSource

    types = {"x": dtype, "y": dtype, "arena": dtype, "index": "*i64", "scale": "*fp32", "u": "*fp32"}
    types |= {"order": "*i32", "items": "*i32", "in_features": "i32", "out_features": "i32", "u_stride": "i32"}
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    attrs = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name not in constants}
    constexprs = {(names.index(name),): value for name, value in constants.items()}
    return triton.compile(ASTSource(kernel, signature, constexprs=constexprs, attrs=attrs), target=target)


def spilled(compiled, tmp_path) -> int:
    """Bytes of local memory per thread (NVIDIA) or registers spilled (AMD), as the binary itself says."""
    if "amdgcn" in compiled.asm:
        return sum(int(n) for n in re.findall(r"[sv]gpr_spill_count:\s*(\d+)", compiled.asm["amdgcn"]))
    import triton

    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    usage = subprocess.run(
        [str(cuobjdump), "-res-usage", str(cubin)], capture_output=True, text=True, check=True
    ).stdout
    found = re.findall(r"STACK:(\d+).*?LOCAL:(\d+)", usage)
    assert found, usage
    return sum(int(stack) + int(local) for stack, local in found)


@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "any-width"])
@pytest.mark.parametrize("block_m", [16, 32])
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "gfx942"])
def test_compiles_without_spills(architecture, block_m, aligned, tmp_path):
    from triton.backends.compiler import GPUTarget

    from gralora_kernels.triton_ops import launch

    target = (
        GPUTarget("hip", "gfx942", 64) if architecture == "gfx942" else GPUTarget("cuda", int(architecture[3:]), 32)
    )
    common = {"ENTRIES": 2, "BLOCK_M": block_m, "BLOCK_R": launch.BLOCK_R, "ALIGNED": aligned}
    shrink = compile_kernel(launch.shrink_kernel, common | {"BLOCK_K": launch.BLOCK_K}, "*bf16", target)
    expand = compile_kernel(launch.expand_kernel, common | {"BLOCK_N": launch.BLOCK_N}, "*bf16", target)

    assert spilled(shrink, tmp_path) == 0
    assert spilled(expand, tmp_path) == 0
    if aligned and target.backend == "cuda":
        for compiled in (shrink, expand):
            assert "cp.async.cg" in compiled.asm["ptx"]  # weights arrive in 16-byte pieces
            assert "ld.global.b16" not in compiled.asm["ptx"]
