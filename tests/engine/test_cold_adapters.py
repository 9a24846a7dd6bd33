"""Cold adapters on a real engine: one tenant's hundreds are not in another one's way."""

from __future__ import annotations

import asyncio
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from adapters.harness import Gate
from engine.test_async_engine import finish, request, until, with_engine
from support.peft_adapters import gralora_config
from support.workspaces import config_of, save_workspace

from gralora_runtime.async_engine import AsyncEngine

NUM_COLD = 200


def test_a_light_tenant_is_answered_while_another_has_hundreds_of_loads_queued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted in loads: those that run when it asks are all that come before its own."""
    workspace = save_workspace(tmp_path, {"light": gralora_config("llama", 8, 2, alpha=32)})
    heavy = [f"heavy{at}" for at in range(NUM_COLD)]
    for name in heavy:
        shutil.copytree(workspace / "adapters" / "light", workspace / "adapters" / name)
    config = config_of(workspace, max_num_seqs=2, max_queue=2 * NUM_COLD, watch="off")

    async def work(engine: AsyncEngine) -> None:
        gate = Gate(monkeypatch)
        gate.shut()
        asked = [replace(request(name, name, max_tokens=2), tenant="heavy") for name in heavy]
        crowd = [asyncio.create_task(finish(engine, one)) for one in asked]
        await until(lambda: engine.load().waiting_for_adapter == NUM_COLD)
        light = asyncio.create_task(finish(engine, replace(request("l", "light", max_tokens=2), tenant="light")))
        await until(lambda: engine.load().waiting_for_adapter == NUM_COLD + 1)
        gate.open()
        assert len((await light).token_ids) == 2
        assert gate.names.index("light") < 10  # threads begin in any order: the next ones, and hardly more
        await asyncio.gather(*crowd)
        assert len(gate.names) == NUM_COLD + 1

    with_engine(config, work)
