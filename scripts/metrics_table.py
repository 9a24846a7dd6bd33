"""Writes the table of `docs/metrics.md` again, after a change of `gralora_server/metrics/series.py`."""

from __future__ import annotations

import re
from pathlib import Path

from gralora_server.metrics.table import table

DOC = Path(__file__).parent.parent / "docs" / "metrics.md"


def main() -> None:
    """The table is the only thing in the file whose lines begin with a bar and name a series."""
    text, count = re.subn(r"\| series \|(?:.*\n)(?:\|.*\n)*", lambda _: table(), DOC.read_text())
    assert count == 1, f"{DOC} has {count} tables of series"
    DOC.write_text(text)


if __name__ == "__main__":
    main()
