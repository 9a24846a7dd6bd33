"""What a kill may leave in a state directory if it comes between two lines that no test stops at."""

from __future__ import annotations

from pathlib import Path


def litter(state: Path) -> None:
    """Halves under the names that a server gives them. A start is to remove them all."""
    for path in ("versions/tmp/half", "versions/tmp/old.gone", "uploads/tmp/new-1", "uploads/tmp/removed-1"):
        (state / path).mkdir()
        (state / path / "adapter_model.safetensors").write_bytes(b"half")
    (state / "uploads" / "tmp" / "record-1").write_text("{")
