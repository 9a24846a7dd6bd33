"""Runs `async def` tests, all on one event loop: grpc.aio has one completion queue a process, and wants one loop.

The top conftest imports the two hooks, which switches this on.
"""

from __future__ import annotations

import asyncio
import inspect

import pytest

LIMIT_S = 20.0  # of one test; only a hang comes near it
RUNNER = pytest.StashKey[asyncio.Runner]()


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    stash = pyfuncitem.config.stash
    if RUNNER not in stash:
        stash[RUNNER] = asyncio.Runner()
    wanted = inspect.signature(pyfuncitem.obj).parameters
    arguments = {name: pyfuncitem.funcargs[name] for name in wanted}
    stash[RUNNER].run(asyncio.wait_for(pyfuncitem.obj(**arguments), LIMIT_S))
    return True


def pytest_unconfigure(config: pytest.Config) -> None:
    if RUNNER in config.stash:
        config.stash[RUNNER].close()
        del config.stash[RUNNER]
