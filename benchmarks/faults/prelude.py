"""Python that runs in a server's process before anything else does, so that it meets a world that we made."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from textwrap import indent

MODULE = "sitecustomize.py"  # which Python imports at its start
# Python goes on without it if it raises Exception: then nothing of what is to be seen would happen.
TEMPLATE = """
try:
{code}
except Exception as error:
    raise SystemExit(f"the prelude failed: {{error!r}}")
"""


def environment(folder: Path, code: str) -> Mapping[str, str]:
    """For a server that begins with this; `folder` is made."""
    folder.mkdir()
    (folder / MODULE).write_text(TEMPLATE.format(code=indent(code, "    ")))
    paths = [str(folder), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
