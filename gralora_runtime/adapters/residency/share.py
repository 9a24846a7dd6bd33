"""What one owner's adapters may take of the pool together. Who owns which names is somebody else's to say. No torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gralora_runtime.errors import GraloraError


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolShare:
    """Of one owner, by the name of an adapter that is its own."""

    owner: str
    max_bytes: int
    refusal: Callable[[str, int], GraloraError]  # for a name, and bytes that would never fit into the share


ShareOf = Callable[[str], PoolShare | None]  # by an adapter's name, from any thread; None: no limit


def no_limit(_name: str) -> PoolShare | None:
    """What is so until somebody says who owns what."""
    return None
