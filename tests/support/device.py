"""Where the exactness and engine tests serve: on the CPU, or on the GPU of a machine that has one.

GRALORA_TEST_DEVICE=cuda python -m pytest tests/model/test_exactness.py tests/engine/test_async_engine.py
"""

from __future__ import annotations

import os

DEVICE = os.environ.get("GRALORA_TEST_DEVICE", "cpu")
ON_GPU = DEVICE != "cpu"
