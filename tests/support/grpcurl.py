"""grpcurl, a client that knows of a server what that reflects."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

GRPCURL = Path(sys.executable).with_name("grpcurl")


def grpcurl(*arguments: str, expect: int = 0) -> str:
    """What it prints; where it is to fail, on standard error."""
    done = subprocess.run(
        [str(GRPCURL), "-plaintext", *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == expect, done.stderr
    return done.stdout if expect == 0 else done.stderr


def objects(text: str) -> list[dict[str, Any]]:
    """JSON objects one after the other, as it prints a stream."""
    decoder, found = json.JSONDecoder(), []
    while text := text.lstrip():
        one, end = decoder.raw_decode(text)
        found.append(one)
        text = text[end:]
    return found
