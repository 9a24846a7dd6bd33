"""What the machine is, and how fast it reads, multiplies and launches: floors are made of these."""

from __future__ import annotations

import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import triton
import triton.language as tl

from benchmarks import machine
from benchmarks.gpu_check.clock import device, device_ms, host_ms


@triton.jit
def nothing(x, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """A launch with one argument."""
    tl.store(x + tl.arange(0, BLOCK), tl.zeros([BLOCK], tl.float32))


def facts() -> dict[str, Any]:
    """Names, versions and rates."""
    found = machine.facts() | {"torch": torch.__version__, "triton": triton.__version__, "vllm": _vllm()} | rates()
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": properties.name,
            "gpu_bytes": properties.total_memory,
            "processors": properties.multi_processor_count,
            "runtime": torch.version.cuda or torch.version.hip,
            "driver": _driver(),
        }
    return found


def rates() -> dict[str, float]:
    """Read bandwidth by a sum over 1 GiB, a square product of random bf16 numbers, an empty launch."""
    on_gpu = torch.cuda.is_available()
    numbers = torch.zeros(1 << (28 if on_gpu else 20), device=device())
    size, dtype = (8192, torch.bfloat16) if on_gpu else (512, torch.float32)
    a, b = (torch.randn(size, size, device=device()).to(dtype) for _ in range(2))
    small = torch.zeros(16, device=device())
    nothing[(1,)](small, BLOCK=16)
    read_ms, product_ms = device_ms(numbers.sum, 10), device_ms(lambda: a @ b, 10)
    return {
        "read_gb_s": _rounded(numbers.numel() * 4 / read_ms / 1e6),
        "product_tflop_s": _rounded(2 * size**3 / product_ms / 1e9),
        "launch_us": round(1e3 * host_ms(lambda: nothing[(1,)](small, BLOCK=16), 50), 1),
    }


def _rounded(rate: float) -> float:
    """To digits and not to places: floors divide by rates, and a busy machine's may be small."""
    return float(f"{rate:.4g}")


def _vllm() -> str | None:
    """Whose figures others may want to put beside these."""
    try:
        return version("vllm")
    except PackageNotFoundError:
        return None


def _driver() -> str:
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
