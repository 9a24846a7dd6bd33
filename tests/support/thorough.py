"""GRALORA_TEST_THOROUGH=1: tests that can go on for longer do: `make test-catalogue`."""

from __future__ import annotations

import os

MANY = os.environ.get("GRALORA_TEST_THOROUGH") == "1"
