"""Where compiled kernels are kept: in a directory named after all sources that they are made of.

Left to itself, Numba looks only at the file of the function that it compiles, and after a change of a function that is
called from there (a `git pull` is enough) it goes on with the old code. Directories of old sources are not cleared.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numba

SOURCES = Path(__file__).parent.parent  # constants of tables and work lists are compiled in as well


def sources_digest(sources: Path = SOURCES) -> str:
    """Of the names and contents of all modules below `sources`."""
    digest = hashlib.sha256()
    for path in sorted(sources.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(sources)} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def use_directory_of_these_sources() -> None:
    """Below the one that the user chose (NUMBA_CACHE_DIR), else beside the kernels. To be called before a kernel is
    defined. Where it cannot be written, Numba uses a directory of its own.
    """
    chosen = numba.config.CACHE_DIR
    above = Path(chosen) if chosen else Path(__file__).parent / "__pycache__"
    numba.config.CACHE_DIR = str(above / f"gralora-{sources_digest()[:16]}")


def is_empty() -> bool:
    """Whether nothing was ever compiled of these sources. No directory: it cannot be written, or Numba had made it."""
    folder = Path(numba.config.CACHE_DIR)
    return folder.exists() and not any(folder.rglob("*.nbi"))
