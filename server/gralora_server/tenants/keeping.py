"""Brings usage back from the state directory, and writes it there every few seconds and at the end.

A server that is killed loses what was counted since the last write, at most `EVERY_S` seconds and the write itself; it
never counts anything twice. What cannot be written stays in memory and is tried again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from gralora_server.errors import UsageFileError
from gralora_server.tenants.usage import Usage
from gralora_server.tenants.usage_file import UsageFile

EVERY_S = 5.0

log = logging.getLogger(__name__)


@asynccontextmanager
async def keeping(usage: Usage, folder: Path | None, *, every_s: float = EVERY_S) -> AsyncIterator[None]:
    """While it is counted. `folder` None: in memory only. Raises `UsageFileError` for a file that cannot be had."""
    if folder is None:
        yield
        return
    file = await asyncio.to_thread(UsageFile, folder)
    try:
        usage.restore(await asyncio.to_thread(file.read))
        ending = asyncio.Event()
        writing = asyncio.create_task(_write_until(ending, usage, file, every_s))
        try:
            yield
        finally:
            ending.set()
            await writing
    finally:
        await asyncio.to_thread(file.close)


async def _write_until(ending: asyncio.Event, usage: Usage, file: UsageFile, every_s: float) -> None:
    """One write after the other, so that no older row is written over a newer one. The last is behind the end."""
    is_last = False
    while not is_last:
        try:
            await asyncio.wait_for(ending.wait(), every_s)
            is_last = True
        except TimeoutError:
            pass
        changed = usage.take_changed()
        if changed:
            try:
                await asyncio.to_thread(file.write, changed)
            except UsageFileError as error:
                log.error("%s", error)  # noqa: TRY400  # the sentence says it all
                usage.put_back(changed)
