"""Programmatic dependent launch: a kernel is set up while the one before it still runs, and waits for it itself.

Only NVIDIA's GPUs since Hopper have it. A kernel that is launched with `EARLY_OPTIONS` must call `wait_for_others`
before it reads or writes memory.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

HOPPER = 9


def _has_it() -> bool:
    """Asked once: a process serves on GPUs of one kind."""
    on_nvidia = torch.cuda.is_available() and torch.version.cuda is not None and not triton.knobs.runtime.interpret
    return on_nvidia and torch.cuda.get_device_capability()[0] >= HOPPER


IS_EARLY = tl.constexpr(_has_it())
EARLY_OPTIONS: dict[str, Any] = {"launch_pdl": True} if IS_EARLY.value else {}


@triton.jit
def wait_for_others():  # noqa: ANN201
    """Until all kernels before this one have ended, and what they wrote can be read."""
    if IS_EARLY:
        tl.extra.cuda.gdc_wait()
