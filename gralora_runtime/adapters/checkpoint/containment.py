"""Where a path may lead: inside of what the operator keeps adapters in, whatever links lie on the way."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def resolve_inside(roots: Sequence[Path], path: Path) -> Path | None:
    """`path` with every link followed; None: it ends outside of all `roots`, or links go in a circle.

    No roots: anywhere. That is for a person's own files on their own machine.
    """
    try:
        resolved = path.resolve()
        if not roots or any(resolved.is_relative_to(root.resolve()) for root in roots):
            return resolved
    except (OSError, RuntimeError, ValueError):  # ValueError: a NUL character
        pass
    return None
