"""Which files make an adapter: nothing else is fetched, whatever a remote has beside them."""

from __future__ import annotations

from gralora_runtime.adapters.checkpoint.header import CONFIG_FILE, GOLDEN_FILE
from gralora_runtime.adapters.checkpoint.tensors import WEIGHTS_FILE

KNOWN_FILES = (CONFIG_FILE, WEIGHTS_FILE, GOLDEN_FILE)
