"""GRALORA_TEST_PIPELINE=on: every engine that a test makes without saying so is pipelined, also those of real servers.

What passes with the pipeline off has to pass with it on: `make test-pipelined`.
"""

from __future__ import annotations

import os

from gralora_runtime.config import EngineConfig

PIPELINE = os.environ.get("GRALORA_TEST_PIPELINE", "auto")
SERVE_OPTIONS = ["--pipeline", PIPELINE]

defaults = EngineConfig.__init__.__kwdefaults__
assert "pipeline" in defaults
defaults["pipeline"] = PIPELINE
EngineConfig.__dataclass_fields__["pipeline"].default = PIPELINE  # the command line's too
