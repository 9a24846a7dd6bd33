"""The rival: merged models behind the same service, one per adapter, taking turns in one process.

It is given what it can be given. Every model runs in this project's own engine and batches its own requests; one
forward pass at a time has all cores; a model that is not in memory is made from the base model in memory and the
adapter, which is faster than reading a merged checkpoint.
"""

from __future__ import annotations

import asyncio
import gc
import threading
from collections import OrderedDict, deque
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import fields, replace
from pathlib import Path
from types import TracebackType

import torch

from gralora_runtime.adapters.checkpoint.loader import load
from gralora_runtime.adapters.manager import AdapterManager
from gralora_runtime.assemble import EngineParts, assemble
from gralora_runtime.async_engine import AsyncEngine
from gralora_runtime.config import EngineConfig
from gralora_runtime.info import EngineInfo, EngineLoad, TokenizeResult
from gralora_runtime.model.adaptable import changeable_shapes
from gralora_runtime.model.loading import BaseModel, load_base_model
from gralora_runtime.model.merging import merge_adapter
from gralora_runtime.observation.activity import Activity, RequestActivity
from gralora_runtime.observation.snapshot import EngineSnapshot
from gralora_runtime.observation.timelines import Timelines
from gralora_runtime.request import GenerationRequest, Prompt
from gralora_runtime.stream import RequestStream
from gralora_server.uninterrupted import uninterrupted

# A merged model serves no adapter; its engine wants a pool all the same.
POOL_BYTES = 1 << 20


class Turn:
    """A lock that is had in the order of asking, so that no model steps twice while another waits."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._waiting: deque[threading.Lock] = deque()
        self._taken = False

    def __enter__(self) -> None:
        with self._mutex:
            if not self._taken:
                self._taken = True
                return
            called = threading.Lock()
            called.acquire()
            self._waiting.append(called)
        called.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._mutex:
            if self._waiting:
                self._waiting.popleft().release()  # it is the next one's without having been free
            else:
                self._taken = False


class FleetEngine:
    """A `gralora_server.ports.Engine`. A request's adapter says which merged model answers; "" is the base model.

    At most `max_models` merged models are in memory. A request for another takes the place of the one that was asked
    for least recently: that one takes no new requests, finishes what it has, and goes. Answers name no adapter, since a
    merged model has none.
    """

    def __init__(
        self, base: AsyncEngine, weights: BaseModel, config: EngineConfig, turn: Turn, max_models: int
    ) -> None:
        self.dead = base.dead
        self.first_token_s = base.first_token_s
        self._base = base
        self._weights = weights  # as loaded: what adapters are merged into copies of
        self._config = replace(config, adapters=(), adapter_pool_bytes=POOL_BYTES)
        self._turn = turn
        self._max_models = max_models
        self._models: OrderedDict[str, AsyncEngine] = OrderedDict()  # the least recently asked for first
        self._swapping = asyncio.Lock()
        self._shape = changeable_shapes(weights.model)

    @classmethod
    async def start(cls, config: EngineConfig, max_models: int, preload: Sequence[str] = ()) -> FleetEngine:
        """The adapters in `preload` are merged before anything is served.

        `config.kv_cache_bytes` is shared out evenly: together the models have what one server would have.
        """
        weights = await asyncio.to_thread(load_base_model, config.model, device=torch.device("cpu"), dtype=config.dtype)
        kv_cache_bytes = None if config.kv_cache_bytes is None else config.kv_cache_bytes // (max_models + 1)
        config = replace(config, kv_cache_bytes=kv_cache_bytes)
        turn = Turn()
        # The first one is checked against transformers, as every server's model is at its start.
        parts = await asyncio.to_thread(assemble, config)
        fleet = cls(AsyncEngine(parts, config, turn), weights, config, turn, max_models)
        for name in preload:
            await fleet._engine(name)
        return fleet

    @property
    def adapters(self) -> AdapterManager:
        """The catalogue of what could be merged."""
        return self._base.adapters

    @property
    def busy_since_s(self) -> float | None:
        """None: what is long for one model may be its wait for the others' turns."""
        return None

    @property
    def timelines(self) -> Timelines:
        """Of requests to the base model alone."""
        return self._base.timelines

    async def submit(self, request: GenerationRequest) -> RequestStream:
        # No pause between getting the engine and its taking the request: it could be swapped out in between.
        engine = await self._engine(request.adapter)
        return await engine.submit(replace(request, adapter=""))

    def abort(self, request_id: str) -> bool:
        return any(engine.abort(request_id) for engine in self._engines())

    async def tokenize(self, prompt: Prompt) -> TokenizeResult:
        return await self._base.tokenize(prompt)

    def token_text(self, token_id: int) -> str:
        return self._base.token_text(token_id)

    def info(self) -> EngineInfo:
        return self._base.info()

    def load(self) -> EngineLoad:
        """The sum over all models."""
        loads = [engine.load() for engine in self._engines()]
        return EngineLoad(
            **{field.name: sum(getattr(one, field.name) for one in loads) for field in fields(EngineLoad)}
        )

    def snapshot(self) -> EngineSnapshot:
        """Of the base model alone: a fleet serves no metrics page."""
        return self._base.snapshot()

    def activity(self) -> Activity:
        """Of the base model alone, likewise."""
        return self._base.activity()

    def under_way(self) -> list[RequestActivity]:
        return [one for engine in self._engines() for one in engine.under_way()]

    def begin_drain(self) -> None:
        for engine in self._engines():
            engine.begin_drain()

    async def close(self) -> None:
        for engine in self._engines():
            await engine.close()

    def _engines(self) -> list[AsyncEngine]:
        return [self._base, *self._models.values()]

    async def _engine(self, name: str) -> AsyncEngine:
        if not name:
            return self._base
        if name in self._models:
            self._models.move_to_end(name)
            return self._models[name]
        async with self._swapping:
            if name not in self._models:
                # Whoever asked may go away; the memory is accounted for, and the next one does not begin anew.
                await uninterrupted(self._make(name))
            return self._models[name]

    async def _make(self, name: str) -> None:
        """Where there is no room, in place of the model that was asked for least recently."""
        source = Path(self.adapters.get(name).source)
        if len(self._models) >= self._max_models:
            await self._swap_out()
        parts = await asyncio.to_thread(self._merged, name, source)
        self._models[name] = AsyncEngine(parts, self._config, self._turn)

    async def _swap_out(self) -> None:
        _, engine = self._models.popitem(last=False)
        await engine.wait_idle(None)
        await engine.close()
        del engine
        gc.collect()  # an engine and its thread refer to each other, and half a gigabyte should not wait

    def _merged(self, name: str, source: Path) -> EngineParts:
        widest = self._config.max_adapter_rank
        adapter = load(name, source, self._shape, torch.float32, max_width=widest)
        base = replace(self._weights, model=deepcopy(self._weights.model))
        merge_adapter(base.model, adapter)
        return assemble(self._config, base)
