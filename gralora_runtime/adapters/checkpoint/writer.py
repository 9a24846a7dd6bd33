"""Writes directories and files, whole or not at all: who looks meanwhile sees what was there before."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from gralora_runtime.adapters.checkpoint.header import CONFIG_FILE
from gralora_runtime.adapters.checkpoint.tensors import WEIGHTS_FILE
from gralora_runtime.errors import ConfigError


def write_adapter(out: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """A new adapter directory. Raises ConfigError if there is something at `out`, or it cannot be written."""
    with new_directory(out) as fresh:
        save_file(dict(tensors), fresh / WEIGHTS_FILE, metadata={"format": "pt"})
        (fresh / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")


@contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """An empty directory to fill, which is `out` when the block ends; if it ends with an exception, nothing is left.

    Raises ConfigError if `out` is anything else than an empty directory or nothing, or cannot be written.
    """
    staging: Path | None = None
    try:
        if out.exists() and not (out.is_dir() and next(out.iterdir(), None) is None):
            raise ConfigError(f"{out} is not an empty directory: nothing is written over what is there")
        out.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        fresh = staging / "new"
        fresh.mkdir()  # for whom `out` would be, and not, as mkdtemp makes it, for its maker alone
        yield fresh
        fresh.replace(out)  # an empty directory goes, and one that was filled meanwhile stays
    except (OSError, SafetensorError) as cause:
        raise ConfigError(f"{out} cannot be written: {cause}") from cause
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)


def replace_file(path: Path, text: str) -> None:
    """Raises ConfigError if it cannot be written."""
    staging = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        try:
            staging.write_text(text)
            staging.replace(path)
        finally:
            staging.unlink(missing_ok=True)
    except OSError as cause:
        raise ConfigError(f"{path} cannot be written: {cause}") from cause
