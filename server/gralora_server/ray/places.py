"""Where a replica keeps what outlives it: a folder of its own below the state directory that all replicas are told."""

from __future__ import annotations

from itertools import count
from pathlib import Path

from filelock import FileLock, Timeout

LOCK = "replica.lock"


class Place:
    """The first folder that nobody holds. The lock is the kernel's, so it goes away with its holder, however that
    ends; and the next replica finds what the one before has fetched.
    """

    def __init__(self, state_dir: Path) -> None:
        """Raises OSError."""
        for number in count():
            self.folder = state_dir / f"replica-{number}"
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = FileLock(self.folder / LOCK, thread_local=False)
            try:
                self._lock.acquire(timeout=0)
            except Timeout:
                continue
            return

    def release(self) -> None:
        self._lock.release()
