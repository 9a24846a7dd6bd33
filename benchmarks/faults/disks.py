"""Disks that take no more under a running server, and have room again later.

Where this process may mount (as root, or in a user namespace), the state directory lies on a small tmpfs that only the
server and its holder see. Where it may not, those faults are skipped; a limit of the kernel's on the size of files,
which nobody needs rights for, is left.
"""

from __future__ import annotations

import asyncio
import errno
import resource
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import SkipTest

from benchmarks.catalogue.content import Contents
from benchmarks.faults import prelude
from benchmarks.faults.acknowledged import Acknowledged
from benchmarks.faults.fault import Fault, Outcome
from benchmarks.faults.seen import Seen, until_done
from benchmarks.faults.stage import Stage
from gralora_server.client import AsyncClient
from gralora_server.loadtest.local_server import LocalServer
from gralora_server.tenants.keeping import EVERY_S

SIZE_BYTES = 64 << 20
PAUSE_S = 0.5
UPLOAD_REFUSED = {"ADAPTER_UPLOAD", "ADAPTER_UPLOAD_QUOTA"}
LASTS_S = EVERY_S + 0.5  # so that usage meets it, too
ANSWERING, FRESH = "a0", "a3"  # the second is asked for the first time when nothing can be written
BEFORE, DURING = "sent-before", "sent-during"
PINNED_BEFORE, PINNED_DURING = "a1", "a2"

Act = Callable[[LocalServer], None]

JOIN = """
import ctypes, os
here = os.getcwd()
for namespace in {namespaces}:
    handle = os.open(namespace, os.O_RDONLY)
    if ctypes.CDLL(None, use_errno=True).setns(handle, 0):
        raise OSError(ctypes.get_errno(), f"joining {{namespace}}")
    os.close(handle)
os.chdir(here)
"""


@dataclass(frozen=True, slots=True)
class Disk:
    """The state directory's, which lives as long as `holder`, a process that does nothing."""

    state: Path
    adapters: Path
    holder: int
    in_user_namespace: bool

    @property
    def code(self) -> str:
        kinds = ("user", "mnt") if self.in_user_namespace else ("mnt",)
        return JOIN.format(namespaces=[f"/proc/{self.holder}/ns/{kind}" for kind in kinds])

    @property
    def _ballast(self) -> Path:
        return Path(f"/proc/{self.holder}/root{self.state / 'ballast'}")

    def fill(self, _: LocalServer) -> None:
        with self._ballast.open("wb", buffering=0) as out:
            try:
                while True:
                    out.write(bytes(1 << 16))
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise

    def empty(self, _: LocalServer) -> None:
        self._ballast.unlink()

    def forbid(self, _: LocalServer) -> None:
        """To whoever opens files from now on: no file system can be remounted under those that write to it."""
        for folder in (self.state, self.adapters):
            self._run("mount", "-o", "bind,ro", str(folder), str(folder))

    def permit(self, _: LocalServer) -> None:
        for folder in (self.state, self.adapters):
            self._run("umount", "--lazy", str(folder))

    def _run(self, *command: str) -> None:
        user = ("--user", "--preserve-credentials") if self.in_user_namespace else ()
        where = ("nsenter", f"--target={self.holder}", *user, "--mount")
        subprocess.run([*where, *command], check=True, capture_output=True)


@contextmanager
def disk_of(stage: Stage) -> Iterator[Disk]:
    """Raises SkipTest where nothing may be mounted."""
    state = stage.folder / "state"
    state.mkdir()
    mount = ["sh", "-c", 'mount -t tmpfs -o "size=$1" none "$2" && echo mounted && exec cat', "sh"]
    for in_user_namespace in (False, True):
        user = ["--user", "--map-root-user"] if in_user_namespace else []
        command = ["unshare", "--mount", *user, *mount, str(SIZE_BYTES), str(state)]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as holder:
            assert holder.stdout is not None
            if holder.stdout.readline():
                yield Disk(state, stage.adapters, holder.pid, in_user_namespace)
                return
    raise SkipTest("this process may mount nothing")


@dataclass(frozen=True, slots=True)
class Trouble:
    """How it comes, and how it goes."""

    begin: Act
    end: Act


def on_a_disk(trouble: Callable[[Disk], Trouble]) -> Callable[[Stage], Outcome]:
    def run(stage: Stage) -> Outcome:
        with disk_of(stage) as disk:
            environment = prelude.environment(stage.folder / "prelude", disk.code)
            return _nothing_can_be_written(stage, trouble(disk), environment)

    return run


def no_file_may_grow(stage: Stage) -> Outcome:
    def limit(server: LocalServer, num_bytes: int) -> None:
        _, most = resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (num_bytes, most))

    trouble = Trouble(lambda server: limit(server, 0), lambda server: limit(server, resource.RLIM_INFINITY))
    return _nothing_can_be_written(stage, trouble)


def _nothing_can_be_written(stage: Stage, trouble: Trouble, environment: Mapping[str, str] | None = None) -> Outcome:
    for number, name in enumerate((BEFORE, DURING), len(stage.names)):
        Contents(stage.base).write(number, stage.folder / name)
    shutil.move(stage.adapters / FRESH, stage.folder / FRESH)
    seen, told = Seen(), Acknowledged()
    with stage.server(environment=environment) as server:
        recovered_s = asyncio.run(_go_on(stage, server, seen, told, trouble))
    with stage.server(environment=environment) as server:
        lost = asyncio.run(_lost(stage, server, told))
    return Outcome(saw=dict(seen.saw), recovered_s=recovered_s, lost=lost, problems=seen.problems)


async def _go_on(stage: Stage, server: LocalServer, seen: Seen, told: Acknowledged, trouble: Trouble) -> float:
    async with AsyncClient(server.address) as client:
        for name in (ANSWERING, PINNED_BEFORE, PINNED_DURING):
            told.answers[name] = await stage.answer(client, name)
        await told.push(stage, client, BEFORE)
        await told.pin(client, PINNED_BEFORE)
        trouble.begin(server)
        until_s = time.monotonic() + LASTS_S
        async with seen.streams(stage, client, told.answers, ANSWERING, BEFORE):
            shutil.move(stage.folder / FRESH, stage.adapters / FRESH)  # by somebody who has room
            while time.monotonic() < until_s:
                await seen.call(f"pushing {DURING}", told.push(stage, client, DURING))
                await seen.call(f"pinning {PINNED_DURING}", told.pin(client, PINNED_DURING))
                await seen.call(FRESH, stage.answer(client, FRESH))
                await asyncio.sleep(PAUSE_S)
        trouble.end(server)
        ended_s = time.monotonic()
        await until_done(lambda: told.push(stage, client, DURING))
        await until_done(lambda: told.pin(client, PINNED_DURING))
        told.answers[FRESH] = await stage.answer(client, FRESH)
        recovered_s = await stage.recovered_s(client, told.answers, ended_s)
        await told.note_usage(client)
    if not seen.saw.keys() & UPLOAD_REFUSED:
        seen.problems.append("no upload was refused: there was room")
    return recovered_s


async def _lost(stage: Stage, server: LocalServer, told: Acknowledged) -> list[str]:
    async with AsyncClient(server.address) as client:
        return await told.lost(stage, client)


FAULTS = (
    Fault(
        "disk-full",
        "the disk of the state directory is full",
        on_a_disk(lambda disk: Trouble(disk.fill, disk.empty)),
    ),
    Fault(
        "disk-read-only",
        "it, and the adapters', become read-only",
        on_a_disk(lambda disk: Trouble(disk.forbid, disk.permit)),
    ),
    Fault("no-file-grows", "the server may write no byte more into any file", no_file_may_grow),
)
