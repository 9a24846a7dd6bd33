"""One replica, from its start to its end: an engine, the parts that answer for it, and what it shares with others.

Knows no Ray: who runs it says what it is called, where changes come from, and how its process ends.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, replace

from gralora_runtime.config import EngineConfig
from gralora_runtime.errors import EngineDeadError
from gralora_server.errors import EngineStuckError
from gralora_server.http.calls import Calls
from gralora_server.http.front import http_calls
from gralora_server.parts import Parts
from gralora_server.ports import Engine
from gralora_server.ray.answering import Answering
from gralora_server.ray.follower import Log
from gralora_server.ray.places import Place
from gralora_server.ray.sharing import Sharing
from gralora_server.settings.configurations import engine_config, server_config
from gralora_server.settings.layers import Layers
from gralora_server.settings.reloader import Reloader
from gralora_server.tenants.keeping import keeping

_log = logging.getLogger(__name__)

StartEngine = Callable[[EngineConfig], Awaitable[Engine]]


@dataclass(frozen=True, slots=True)
class Replica:
    """While it serves. `http` is an application of ASGI."""

    parts: Parts
    engine: Engine
    grpc: Answering
    http: Calls

    def check(self) -> None:
        """Raises what is wrong with it."""
        if self.engine.dead.is_set():
            raise EngineDeadError
        if self.parts.gate.stuck:
            raise EngineStuckError

    @property
    def num_requests(self) -> int:
        """That run or wait."""
        load = self.engine.load()
        return load.running + load.waiting + load.waiting_for_adapter + load.paused


@dataclass(frozen=True, slots=True, kw_only=True)
class Runner:
    """Who runs a replica. `give_up` ends its process for a step that does not end, `end` for an engine that died."""

    name: str
    log: Log
    start_engine: StartEngine
    give_up: Callable[[], None]
    end: Callable[[], None]


@asynccontextmanager
async def serving(layers: Layers, runner: Runner) -> AsyncIterator[Replica]:
    """A replica that has made every change that the others have made. Raises what starting an engine raises."""
    async with AsyncExitStack() as stack:
        layers = await _placed(layers, stack)
        reloader = Reloader(layers.read)
        config, model = server_config(reloader.settings), reloader.settings.engine.model
        assert model is not None, "a plan has one"
        sharing = Sharing(runner.name, runner.log)
        parts = Parts(config, reloader, adapters=sharing.adapters, about=sharing.about)
        await stack.enter_async_context(keeping(parts.usage, config.state_dir))
        engine = await runner.start_engine(engine_config(reloader.settings, model))
        stack.push_async_callback(engine.close)
        stack.enter_context(parts.watched(engine, give_up=runner.give_up))
        await parts.open(engine)
        stack.push_async_callback(parts.drain, 0.0)  # Serve has waited for what ran
        await stack.enter_async_context(sharing.follower.following())
        await stack.enter_async_context(_dying(parts, engine, runner.end))
        yield Replica(parts, engine, Answering(parts, runner.name), http_calls(config, parts))


async def _placed(layers: Layers, stack: AsyncExitStack) -> Layers:
    """The same, with a state directory that is this replica's own."""
    state_dir = layers.read().settings.adapters.state_dir
    if state_dir is None:
        return layers
    place = await asyncio.to_thread(Place, state_dir)
    stack.callback(place.release)
    return replace(layers, options={**layers.options, "adapters.state_dir": str(place.folder)})


@asynccontextmanager
async def _dying(parts: Parts, engine: Engine, end: Callable[[], None]) -> AsyncIterator[None]:
    """While it lasts, a dead engine ends its process, so that another replica takes its place at once."""

    async def wait() -> None:
        await engine.dead.wait()
        _log.critical("the engine died: this replica ends")
        await parts.fail()
        end()

    waiting = asyncio.create_task(wait())
    try:
        yield
    finally:
        waiting.cancel()
        with suppress(asyncio.CancelledError):
            await waiting
