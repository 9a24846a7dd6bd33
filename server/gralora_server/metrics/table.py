"""The table of `docs/metrics.md`, from the series themselves."""

from __future__ import annotations

from gralora_server.metrics.series import ALL


def table() -> str:
    """In Markdown, one line a series."""
    lines = ["| series | type | labels | meaning |", "|---|---|---|---|"]
    for one in ALL:
        labels = ", ".join(f"`{label}`" for label in one.labels)
        lines.append(f"| `{one.name}` | {one.kind} | {labels} | {one.text} |")
    return "\n".join(lines) + "\n"
