"""The list of files, sizes and hashes, written last into a prepared model directory: present and true means whole."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

MANIFEST = "gralora_manifest.json"
FORMAT = 1  # a change of the recipe raises it, so that directories of the old recipe are made anew
CHUNK_BYTES = 1 << 20

Progress = Callable[[str, int, int | None], None]  # stage, done, total


def write_manifest(directory: Path, source_sha256: str, progress: Progress) -> None:
    """Hash every file of `directory` and write the manifest beside them."""
    paths = sorted(path for path in directory.iterdir() if path.is_file())
    total = sum(path.stat().st_size for path in paths)
    files: dict[str, dict[str, object]] = {}
    done = 0
    for path in paths:
        progress("Hashing the result", done, total)
        files[path.name] = {"size_bytes": path.stat().st_size, "sha256": file_sha256(path)}
        done += path.stat().st_size
    progress("Hashing the result", total, total)
    manifest = {"format": FORMAT, "source_sha256": source_sha256, "files": files}
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def manifest_problem(directory: Path, source_sha256: str, *, hashes: bool) -> str | None:
    """Why `directory` is not the whole, unchanged result of converting that source; None when it is.

    Sizes cost nothing and catch what was cut short; `hashes` reads every byte.
    """
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return "it has no manifest"
    except json.JSONDecodeError:
        return "its manifest is not JSON"
    if manifest.get("format") != FORMAT or manifest.get("source_sha256") != source_sha256:
        return "it was made from another source or by another recipe"
    problems = (_file_problem(directory / name, facts, hashes=hashes) for name, facts in manifest["files"].items())
    return next((problem for problem in problems if problem is not None), None)


def _file_problem(path: Path, facts: dict[str, object], *, hashes: bool) -> str | None:
    if not path.is_file():
        return f"{path.name} is missing"
    if path.stat().st_size != facts["size_bytes"]:
        return f"{path.name} has {path.stat().st_size} bytes instead of {facts['size_bytes']}"
    if hashes and file_sha256(path) != facts["sha256"]:
        return f"the content of {path.name} has changed"
    return None


def file_sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
