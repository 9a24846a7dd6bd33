"""GRALORA_TEST_PIPELINE=on: every engine that a test builds without saying so is pipelined."""

from __future__ import annotations

import os

from gralora_runtime.config import EngineConfig

if os.environ.get("GRALORA_TEST_PIPELINE") == "on":
    EngineConfig.__init__.__kwdefaults__["pipeline"] = "on"
