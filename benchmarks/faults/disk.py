"""A small disk that can be filled and made read-only, for a server in a mount namespace of its own.

No right is needed where unprivileged user namespaces are allowed. Nothing outside of the namespace sees the disk, but
for whoever goes through the holder's /proc/PID/root.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import SkipTest

PIECE = 1 << 20
READY = "mounted"
HOLD = 'mount -t tmpfs -o size={size} none "$1" && echo ' + READY + " && exec cat"  # until its input ends


class NoDiskError(SkipTest):
    """This machine lets nobody mount one. Tests are skipped by it."""


@dataclass(frozen=True, slots=True)
class Disk:
    """`inside` is its path for a program that was started behind `before`."""

    holder: int  # the process that keeps the namespace
    inside: Path

    @property
    def before(self) -> list[str]:
        """Of a command that is to see it."""
        return ["nsenter", "--target", str(self.holder), "--user", "--mount", "--preserve-credentials"]

    @property
    def outside(self) -> Path:
        """Its path for us."""
        return Path(f"/proc/{self.holder}/root") / self.inside.relative_to("/")

    def fill(self) -> None:
        """To the last byte."""
        with (self.outside / "ballast").open("ab", buffering=0) as ballast:
            for size in (PIECE, 1):
                _write_all(ballast.fileno(), size)

    def give_room(self) -> None:
        (self.outside / "ballast").unlink()

    def make_read_only(self, *parts: str) -> None:
        """What is opened from now on by these paths below it; no parts: all of it, which nobody may have open."""
        if not parts:
            self._mount("-o", "remount,ro", str(self.inside))
        for part in parts:
            path = str(self.inside / part)
            self._mount("--bind", path, path)
            self._mount("-o", "remount,bind,ro", path)

    def make_writable(self, *parts: str) -> None:
        if not parts:
            self._mount("-o", "remount,rw", str(self.inside))
        for part in parts:
            self._run("umount", "--lazy", str(self.inside / part))

    def _mount(self, *arguments: str) -> None:
        self._run("mount", *arguments)

    def _run(self, *command: str) -> None:
        subprocess.run([*self.before, *command], check=True, capture_output=True, text=True)  # noqa: S603


@contextmanager
def small_disk(path: Path, size: str) -> Iterator[Disk]:
    """Raises NoDiskError."""
    path.mkdir()
    script = ["sh", "-c", HOLD.format(size=size), "sh", str(path)]
    with _holder(["unshare", "--user", "--map-root-user", "--mount", *script]) as holder:
        assert holder.stdout is not None
        if holder.stdout.readline().strip() != READY:
            assert holder.stderr is not None
            raise NoDiskError(f"no disk can be mounted here: {holder.stderr.read().strip()}")
        yield Disk(holder.pid, path)


@contextmanager
def _holder(command: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    if shutil.which("unshare") is None or shutil.which("nsenter") is None:
        raise NoDiskError("no disk can be mounted here: there is no unshare or no nsenter")
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:  # noqa: S603
        try:
            yield process
        finally:
            process.kill()


def _write_all(descriptor: int, size: int) -> None:
    piece = bytes(size)
    try:
        while os.write(descriptor, piece) == size:
            pass
    except OSError:
        return
