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


def setting_variables() -> dict[str, str]:
    """What a server's settings may be read from; which names mean something is theirs to know."""
    return dict(os.environ)


def limit_spinning() -> None:
    """Before torch is imported: let OpenMP threads wait at barriers by spinning briefly, then sleep.

    The gRPC loop shares the cores with them. 16 streams through gRPC on 2 cores decoded 157 tokens/s with the default
    (spin for long), 180 with OMP_WAIT_POLICY=passive (sleep at once), and 181, 194 to 212 and 173 with a spin count of
    1000, 10000 and 100000. What the user has set stays.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = "10000"
