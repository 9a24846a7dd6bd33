"""Compiled kernels are kept on disk, and never outlive the sources that they were made of."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from gralora_kernels.cpu.cache import SOURCES, sources_digest

ONE = """
import torch
from gralora_kernels.cpu.linear import PackedWeight, linear
out = torch.zeros(1, 16)
linear(out, torch.ones(1, 3), PackedWeight(torch.ones(16, 3)), None)
print(out[0, 0].item())
"""


def run(folder: Path) -> float:
    environment = {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"}
    environment["PYTHONPATH"] = str(folder)
    return float(subprocess.check_output([sys.executable, "-c", ONE], env=environment, text=True))


def kept(folder: Path) -> set[Path]:
    return set(folder.rglob("*.nbc"))


def test_a_kernel_is_compiled_anew_when_what_it_calls_has_changed(tmp_path: Path) -> None:
    """It once was not: `linear.py` was as before, so Numba took the old microkernel from its cache."""
    shutil.copytree(SOURCES, tmp_path / SOURCES.name, ignore=shutil.ignore_patterns("__pycache__"))
    microkernel = tmp_path / SOURCES.name / "cpu" / "microkernel.py"

    assert run(tmp_path) == 3.0
    first = kept(tmp_path)
    assert first
    assert run(tmp_path) == 3.0
    assert kept(tmp_path) == first  # the second time it came from the disk

    before = microkernel.read_text()
    after = before.replace("lambda: [constant(0.0)] * count", "lambda: [constant(1.0)] * count")
    assert after != before
    microkernel.write_text(after)
    assert run(tmp_path) == 4.0


def test_the_digest_names_files_and_contents(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x")
    digests = {sources_digest(tmp_path)}
    (tmp_path / "a.py").write_text("y")
    digests.add(sources_digest(tmp_path))
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    digests.add(sources_digest(tmp_path))
    (tmp_path / "b.txt").write_text("no source")
    digests.add(sources_digest(tmp_path))

    assert len(digests) == 3
