"""A load test leaves a server as it found it: what it unloaded is loaded again, from where it was, pinned if it was."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from gralora_runtime.errors import ConfigError
from gralora_server.client import ServerError
from gralora_server.loadtest.churn import Churn


class FakeAdapters:
    """The client's `adapters`. Loading takes longer than the test's runs."""

    def __init__(self) -> None:
        self.loaded = {"a": ("/there/a", False), "b": ("/there/b", True)}
        self.calls: list[tuple[Any, ...]] = []

    async def list(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(name=n, source=source, pinned=pin) for n, (source, pin) in self.loaded.items()]

    async def unload(self, name: str) -> None:
        self.calls.append(("unload", name))
        del self.loaded[name]

    async def load(self, name: str, source: str, *, pin: bool) -> None:
        await asyncio.sleep(0.1)
        self.calls.append(("load", name))
        self.loaded[name] = (source, pin)


def test_a_run_that_ends_between_unloading_and_loading_leaves_nothing_unloaded() -> None:
    adapters = FakeAdapters()
    before = dict(adapters.loaded)

    async def run() -> None:
        async with churn.running(SimpleNamespace(adapters=adapters)):
            while not adapters.calls:  # noqa: ASYNC110  # a list of another object: there is no event to wait for
                await asyncio.sleep(0.001)
            assert len(adapters.loaded) == 1

    churn = Churn(names=("a", "b"), per_s=100.0, seed=0)
    asyncio.run(run())

    assert adapters.loaded == before
    assert churn.stats().unloads == churn.stats().reload_s.count == 1


def test_adapters_that_may_not_be_listed_end_the_run() -> None:
    class Refusing(FakeAdapters):
        async def list(self) -> list[SimpleNamespace]:
            raise ServerError(grpc.StatusCode.INTERNAL, "no")

    async def run() -> None:
        async with Churn(names=("a",), per_s=1.0, seed=0).running(SimpleNamespace(adapters=Refusing())):
            pass

    with pytest.raises(ServerError):
        asyncio.run(run())


def test_adapters_that_the_server_does_not_have_are_named() -> None:
    async def run() -> None:
        async with Churn(names=("c", "d"), per_s=1.0, seed=0).running(SimpleNamespace(adapters=FakeAdapters())):
            pass

    with pytest.raises(ConfigError, match="none of the adapters that should come and go: c, d"):
        asyncio.run(run())
