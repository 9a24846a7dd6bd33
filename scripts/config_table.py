"""Writes the tables of `docs/config.md` again, after a change of `gralora_server/settings/sections.py`."""

from __future__ import annotations

import re
from pathlib import Path

from gralora_server.settings.reference import table

DOC = Path(__file__).parent.parent / "docs" / "config.md"


def main() -> None:
    """The tables are all that stands between two marks, which a reader does not see."""
    begin, end = "<!-- settings -->\n", "<!-- end of settings -->\n"
    pattern = re.escape(begin) + r".*" + re.escape(end)
    text, count = re.subn(pattern, lambda _: begin + table() + end, DOC.read_text(), flags=re.DOTALL)
    assert count == 1, f"{DOC} has {count} places for the tables of settings"
    DOC.write_text(text)


if __name__ == "__main__":
    main()
