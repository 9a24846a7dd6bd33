"""Run as a program: counts requests for a folder's `usage.sqlite` until somebody kills it, and says how many there are.

`counting N`, before the Nth is counted; `kept N`, when a write that began after it has ended.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

from gralora_server.tenants.keeping import keeping
from gralora_server.tenants.usage import Counts, Usage, UsageRow
from gralora_server.tenants.usage_file import UsageFile

TENANT, ADAPTER = "acme", "poet"
write = UsageFile.write


def say(word: str, number: int) -> None:
    os.write(1, f"{word} {number}\n".encode())  # whole, whichever thread says it


def write_and_tell(file: UsageFile, rows: list[UsageRow]) -> None:
    write(file, rows)
    for row in rows:
        say("kept", row.counts.requests)


async def main(folder: Path) -> None:
    usage = Usage()
    async with keeping(usage, folder, every_s=0.001):
        number = sum(row.counts.requests for row in usage.rows(tenant=TENANT, first=("", ""), limit=1))
        while True:
            number += 1
            say("counting", number)
            usage.add(TENANT, ADAPTER, Counts(requests=1, output_tokens=3))
            await asyncio.sleep(0)


if __name__ == "__main__":
    UsageFile.write = write_and_tell  # type: ignore[method-assign]
    asyncio.run(main(Path(sys.argv[1])))
