"""The page of what is served says what the tests compare."""

from __future__ import annotations

import importlib.util
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "scripts" / "compatibility.py"


def test_the_page_is_as_the_script_writes_it() -> None:
    spec = importlib.util.spec_from_file_location("compatibility", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    assert script.DOC.read_text() == script.page(), "docs/compatibility.md is stale: python scripts/compatibility.py"
