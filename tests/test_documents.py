"""Documents name files that are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name", ["SECURITY.md", "docs/config.md"])
def test_files_that_a_document_names_exist(name: str) -> None:
    named = re.findall(r"`((?:[\w.-]+/)+[\w.-]+\.\w+|[\w-]+\.txt)`", (ROOT / name).read_text())

    assert [path for path in named if not (ROOT / path).exists()] == []
    assert named or name != "SECURITY.md"
