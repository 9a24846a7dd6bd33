"""Adapter files that are damaged, or replaced by what cannot be read to an end, while adapters are served from them."""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from benchmarks.catalogue.answers import prompt_of
from benchmarks.faults.fault import Fault, Outcome
from benchmarks.faults.seen import Seen
from benchmarks.faults.stage import MAX_TOKENS, Stage, Tokens
from gralora_runtime.adapters.checkpoint.header import CONFIG_FILE
from gralora_runtime.adapters.checkpoint.tensors import WEIGHTS_FILE
from gralora_server.client import AsyncClient
from gralora_server.loadtest.local_server import LocalServer

Damage = Callable[[Path], None]

WHOLE, RESIDENT, NO_WEIGHTS, NO_CONFIG = "a0", "a1", "a2", "a3"  # the last two are asked for the first time too late
LOADING = tuple(f"late{number}" for number in range(6))
APART_S = 0.01  # so much later after it was asked for is each of these damaged
MOST_GROWTH_BYTES = 256 << 20  # /dev/zero is endless; the server may not read it so


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def make_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def make_directory(file: Path) -> None:
    file.unlink()
    file.mkdir()


def link(file: Path, *, to: str) -> None:
    file.unlink()
    file.symlink_to(to)


def damaged(stage: Stage, damage: Damage) -> Outcome:
    """While its adapter is resident, not loaded yet, and being loaded."""
    for number, name in enumerate(LOADING):
        shutil.copytree(stage.adapters / stage.names[number % len(stage.names)], stage.adapters / name)
    stage = replace(stage, names=(*stage.names, *LOADING))
    for name in stage.names:
        shutil.copytree(stage.adapters / name, stage.adapters / _twin(name))
    with stage.server() as server:
        return asyncio.run(_damaged(stage, server, damage))


async def _damaged(stage: Stage, server: LocalServer, damage: Damage) -> Outcome:
    seen = Seen()
    async with AsyncClient(server.address) as client:
        expected = {name: await _as_twin(stage, client, name) for name in stage.names}
        for name in (WHOLE, RESIDENT):
            await seen.call(name, stage.answer(client, name), expected[name])
        descriptors, memory = server.process.num_fds(), server.process.memory_info().rss
        async with seen.streams(stage, client, expected, WHOLE, RESIDENT):
            for name, file in ((RESIDENT, WEIGHTS_FILE), (NO_WEIGHTS, WEIGHTS_FILE), (NO_CONFIG, CONFIG_FILE)):
                damage(stage.adapters / name / file)
            await _damage_while_loading(stage, client, seen, expected, damage)
            for name in (NO_WEIGHTS, NO_CONFIG) * 2:  # found damaged, and known to be
                await seen.refusal(name, stage.answer(client, name))
        for name in stage.names:
            _mend(stage.adapters / name, stage.adapters / _twin(name))
        recovered_s = await stage.recovered_s(client, expected, time.monotonic())
        await seen.descriptors(server, descriptors)
        growth = server.process.memory_info().rss - memory
    if growth > MOST_GROWTH_BYTES:
        seen.problems.append(f"the server grew by {growth >> 20} MiB")
    return Outcome(saw=dict(seen.saw), recovered_s=recovered_s, problems=seen.problems)


async def _damage_while_loading(
    stage: Stage, client: AsyncClient, seen: Seen, expected: Mapping[str, Tokens], damage: Damage
) -> None:
    """Each a little later after it was asked for. Both the right answer and a refusal are right."""

    async def one(number: int, name: str) -> None:
        asking = asyncio.create_task(seen.call(name, stage.answer(client, name), expected[name]))
        await asyncio.sleep(APART_S * number)
        damage(stage.adapters / name / WEIGHTS_FILE)
        await asking

    await asyncio.gather(*(one(number, name) for number, name in enumerate(LOADING)))


async def _as_twin(stage: Stage, client: AsyncClient, name: str) -> Tokens:
    """What the name has to answer, from an adapter of the same content, so that its own files stay unread."""
    prompt = prompt_of(name, stage.base.vocab_size)
    result = await client.generate(
        token_ids=prompt, adapter=_twin(name), temperature=0.0, max_tokens=MAX_TOKENS, ignore_eos=True
    )
    return tuple(result.token_ids)


def _twin(name: str) -> str:
    return f"twin-{name}"


def _mend(directory: Path, whole: Path) -> None:
    """As an operator does, who copies what he has over it."""
    shutil.rmtree(directory)
    shutil.copytree(whole, directory)


def _fault(name: str, happens: str, damage: Damage) -> Fault:
    return Fault(name, f"files of adapters {happens}", lambda stage: damaged(stage, damage))


FAULTS = (
    _fault("files-truncated", "are cut to half", truncate),
    _fault("files-deleted", "are deleted", Path.unlink),
    _fault("files-pipe", "become pipes that nobody writes into", make_pipe),
    _fault("files-endless", "become links to /dev/zero", partial(link, to="/dev/zero")),
    _fault("files-stdin", "become links to /dev/stdin", partial(link, to="/dev/stdin")),
    _fault("files-directory", "become directories", make_directory),
)
