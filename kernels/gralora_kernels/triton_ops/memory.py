"""What all launches share: the size of the device, memory that grows, and the way over to it."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache
def num_processors(device: torch.device) -> int:
    """Multiprocessors of a GPU. One under the interpreter, so that tests see programs with several items."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def gpu_kind() -> str:
    """As the options of a `Variant` name it."""
    return "hip" if torch.version.hip else "cuda"


def at_least(memory: Tensor, numel: int) -> Tensor:
    """`memory`, flat, or new memory of its kind if it is too small."""
    if memory.numel() >= numel:
        return memory
    return torch.empty(numel, dtype=memory.dtype, device=memory.device)


def staged(words: Tensor, device: torch.device) -> Tensor:
    """What can be copied without waiting. Fresh pinned memory each time: torch keeps it until the copy is done."""
    return words.pin_memory() if device.type == "cuda" else words
