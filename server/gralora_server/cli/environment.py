"""The only reader of environment variables. A leaf file: it imports nothing of ours."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """$GRALORA_CACHE, or `gralora` in the user's cache directory."""
    own = os.environ.get("GRALORA_CACHE")
    if own:
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "gralora"


def offline_environment() -> dict[str, str]:
    """For a child that reads local files only: without this, its libraries would ask a model hub about them."""
    return {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def bearer_token() -> str | None:
    """$GRALORA_TOKEN: a token on the command line would be everybody's to read."""
    return os.environ.get("GRALORA_TOKEN") or None
