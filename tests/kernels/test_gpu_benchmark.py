"""What can be tested of benchmarks/gpu.py without a GPU: it refuses, its cases are right, its gate lets nothing by.

The gate on the kernels themselves runs in triton_interpreter.py.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.kernel_cases import CPU

from gralora_kernels.reference.adapters import ReferenceBackend

pytest.importorskip("triton")

from benchmarks import gpu
from benchmarks.gate import GateRedError

SHAPES = [(48, [32, 16]), (32, [48])]
ROOT = Path(__file__).parent.parent.parent


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_fails():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu"],
        env={"PYTHONPATH": str(ROOT / "scripts")}, cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert done.returncode == 1
    assert "needs a CUDA or ROCm GPU, and torch sees none" in done.stderr


def test_a_case_has_one_adapter_per_segment_and_passes_the_gate():
    case = gpu.build_case(SHAPES * 2, [1, 3], r=4, k=2, device=CPU, dtype=torch.float32)

    gpu.check(case, ReferenceBackend(), len(SHAPES))
    case.run(ReferenceBackend())

    assert case.slots == [0, 1, 1, 1]
    assert len(case.groups) == 4
    assert all(output.any(dim=1).all() for output in case.outputs)
    assert gpu.flops(case, 4) == 2 * 4 * 4 * 2 * ((48 + 32) + (48 + 16) + (32 + 48))


class Wrong(ReferenceBackend):
    """Off by a little in every step, or only in steps of several tokens."""

    def __init__(self, *, alone: bool) -> None:
        self._alone = alone

    def apply(self, y, x, arena, group, grouping):
        super().apply(y, x, arena, group, grouping)
        if self._alone:
            y *= 1.001
        elif grouping.num_tokens > 1:
            y *= 1 + 1e-6


@pytest.mark.parametrize(("alone", "message"), [(True, "group 0: RMS error"), (False, "depends on its batch")])
def test_the_gate_stops_wrong_kernels(alone, message):
    case = gpu.build_case(SHAPES, [1, 3], r=4, k=2, device=CPU, dtype=torch.float32)

    with pytest.raises(GateRedError, match=message):
        gpu.check(case, Wrong(alone=alone), len(SHAPES))
