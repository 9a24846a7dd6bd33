"""One scale-free error number, and the bounds that every numeric test uses."""

from __future__ import annotations

import torch
from torch import Tensor

# RMS error / RMS of the expected values. fp32: rounding of a few hundred sums, with a margin of ten.
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def rms_ratio(expected: Tensor, actual: Tensor) -> float:
    """RMS of the difference over RMS of `expected`; NaN anywhere gives NaN, which fails every comparison."""
    error = (actual.double() - expected.double()).square().mean().sqrt()
    return float(error / expected.double().square().mean().sqrt().clamp_min(1e-30))


def assert_close(expected: Tensor, actual: Tensor) -> None:
    """By the bound of `actual`'s dtype."""
    ratio = rms_ratio(expected, actual)
    bound = BOUNDS[actual.dtype]
    largest = float((actual.double() - expected.double()).abs().max()) if expected.numel() else 0.0
    assert expected.numel() == 0 or ratio <= bound, f"RMS error ratio {ratio:.3g} > {bound:g} (largest {largest:.3g})"
