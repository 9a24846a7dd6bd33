"""What a server keeps for its next start, damaged: between two starts, and under a server that runs."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from benchmarks.catalogue.content import Contents
from benchmarks.faults.acknowledged import Acknowledged
from benchmarks.faults.fault import Fault, Outcome
from benchmarks.faults.refused_start import problems_of_start
from benchmarks.faults.seen import Seen
from benchmarks.faults.stage import Stage
from gralora_runtime.adapters.catalogue import database, uploads
from gralora_runtime.adapters.checkpoint.tensors import WEIGHTS_FILE
from gralora_server.client import AsyncClient
from gralora_server.loadtest.local_server import LocalServer
from gralora_server.tenants import usage_file

PINNED, PINNED_LATER = "a1", "a2"
SENT, TORN, UNRECORDED = "sent", "torn", "unrecorded"
CONTENTS = (SENT, TORN, UNRECORDED)
REFUSED_START = "start refused"
NEWER_SCHEMA = 99

Damage = Callable[[Path], None]


def fill_with_garbage(file: Path) -> None:
    """In place, so that who has it open has it, too."""
    with file.open("r+b") as out:
        out.write(b"garbage." * (file.stat().st_size // 8))


def halve(file: Path) -> None:
    with file.open("r+b") as out:
        out.truncate(file.stat().st_size // 2)


def make_newer(file: Path) -> None:
    with closing(sqlite3.connect(file)) as connection:
        connection.execute(f"PRAGMA user_version = {NEWER_SCHEMA}")


def between_starts(stage: Stage, name: str, damage: Damage) -> Outcome:
    """Nobody may serve from it. What was there before is put back, as from a backup."""
    _write(stage, SENT)
    told = Acknowledged()
    with stage.server() as server:
        asyncio.run(_write_state(stage, server, told, SENT))
    file = stage.folder / "state" / name
    backup = file.read_bytes()
    damage(file)
    problems = problems_of_start(stage.arguments(), names=name)
    file.write_bytes(backup)
    mended_s = time.monotonic()
    with stage.server() as server:
        recovered_s, lost = asyncio.run(_come_back(stage, server, told, mended_s))
    return Outcome(saw={REFUSED_START: 1 - bool(problems)}, recovered_s=recovered_s, lost=lost, problems=problems)


def overwritten(stage: Stage) -> Outcome:
    """Under a server. What it acknowledges afterwards is there at the next start, or that start is refused.

    Then the remedy of the refusal has to help: moved away, the names come anew, from directories and uploads.
    """
    _write(stage, SENT)
    told, seen = Acknowledged(), Seen()
    folder = stage.folder / "state"
    with stage.server() as server:
        asyncio.run(_go_on(stage, server, told, seen, folder / database.FILE))
    problems = problems_of_start(stage.arguments(), names=database.FILE)
    for file in folder.glob(f"{database.FILE}*"):
        file.rename(stage.folder / file.name)
    told.pinned.clear()  # what only the catalogue knew: an operator has moved it away
    moved_s = time.monotonic()
    with stage.server() as server:
        recovered_s, lost = asyncio.run(_come_back(stage, server, told, moved_s))
    return Outcome(saw=dict(seen.saw), recovered_s=recovered_s, lost=lost, problems=seen.problems + problems)


def uploads_damaged(stage: Stage) -> Outcome:
    """Between two starts: one's weights are cut to half, another's record is garbage, and one is left alone."""
    for name in CONTENTS:
        _write(stage, name)
    told, seen = Acknowledged(), Seen()
    with stage.server() as server:
        asyncio.run(_write_state(stage, server, told, *CONTENTS))
    halve(_upload(stage, TORN) / WEIGHTS_FILE)
    fill_with_garbage(_upload(stage, UNRECORDED).parent / uploads.RECORD_FILE)
    with stage.server() as server:
        recovered_s, lost = asyncio.run(_send_again(stage, server, told, seen))
    return Outcome(saw=dict(seen.saw), recovered_s=recovered_s, lost=lost, problems=seen.problems)


async def _write_state(stage: Stage, server: LocalServer, told: Acknowledged, *sent: str) -> None:
    async with AsyncClient(server.address) as client:
        told.answers.update(await stage.answers(client))
        for name in sent:
            await told.push(stage, client, name)
        await told.pin(client, PINNED)
        await told.note_usage(client)


async def _come_back(stage: Stage, server: LocalServer, told: Acknowledged, since_s: float) -> tuple[float, list[str]]:
    async with AsyncClient(server.address) as client:
        recovered_s = await stage.recovered_s(client, told.answers, since_s)
        return recovered_s, await told.lost(stage, client)


async def _go_on(stage: Stage, server: LocalServer, told: Acknowledged, seen: Seen, file: Path) -> None:
    await _write_state(stage, server, told, SENT)
    async with AsyncClient(server.address) as client:
        fill_with_garbage(file)
        async with seen.streams(stage, client, told.answers, *stage.names, SENT):
            await seen.call(f"pinning {PINNED_LATER}", told.pin(client, PINNED_LATER))
            await seen.call("what is there", client.adapters.list())


async def _send_again(stage: Stage, server: LocalServer, told: Acknowledged, seen: Seen) -> tuple[float, list[str]]:
    async with AsyncClient(server.address) as client:
        for name in (SENT, UNRECORDED, *stage.names):
            await seen.call(name, stage.answer(client, name), told.answers[name])
        await seen.refusal(TORN, stage.answer(client, TORN))
        begun_s = time.monotonic()
        await seen.call(f"sending {TORN} again", client.adapters.push(stage.folder / TORN, TORN))
        recovered_s = await stage.recovered_s(client, told.answers, begun_s)
        return recovered_s, await told.lost(stage, client)


def _write(stage: Stage, name: str) -> None:
    """Each has a content that no other adapter has."""
    Contents(stage.base).write(len(stage.names) + CONTENTS.index(name), stage.folder / name)


def _upload(stage: Stage, name: str) -> Path:
    """Where its only upload lies."""
    folder = stage.folder / "state" / "uploads"
    (found,) = [
        record.parent for record in folder.glob(f"*/{uploads.RECORD_FILE}") if f'"{name}"' in record.read_text()
    ]
    (upload,) = [entry for entry in found.iterdir() if entry.is_dir()]
    return upload


def _catalogue(damage: Damage) -> Callable[[Stage], Outcome]:
    return lambda stage: between_starts(stage, database.FILE, damage)


FAULTS = (
    Fault("catalogue-garbage", "the catalogue is overwritten with garbage", _catalogue(fill_with_garbage)),
    Fault("catalogue-half", "the catalogue is cut to half", _catalogue(halve)),
    Fault("catalogue-newer", "the catalogue is a newer server's", _catalogue(make_newer)),
    Fault("catalogue-overwritten", "the catalogue becomes garbage under the server", overwritten),
    Fault(
        "usage-garbage", "usage.sqlite is overwritten with garbage",
        lambda stage: between_starts(stage, usage_file.FILE, fill_with_garbage),
    ),
    Fault("uploads-damaged", "one upload is cut to half, another's record garbage", uploads_damaged),
)  # fmt: skip
