"""Which exceptions say that memory ran out: Python's, a GPU's, and what torch raises for host memory."""

from __future__ import annotations

import sys
from typing import Any

# torch has no type of its own for this one.
OF_HOST_MEMORY = "DefaultCPUAllocator: can't allocate memory"


def out_of_memory(error: BaseException) -> bool:
    """With less work at a time, the same might have succeeded."""
    if isinstance(error, MemoryError):
        return True
    torch: Any = sys.modules.get("torch")  # where nobody has imported it, as in clients, nobody has its errors
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and OF_HOST_MEMORY in str(error)
