"""What the service needs of an engine, as protocols: `AsyncEngine` and `AdapterManager` satisfy them, fakes do too.

Stated here so that the service and its tests load neither torch nor a model.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Protocol

from gralora_runtime.adapters.info import AdapterInfo, UnloadResult
from gralora_runtime.info import EngineInfo, EngineLoad, TokenizeResult
from gralora_runtime.observation.snapshot import EngineSnapshot
from gralora_runtime.request import GenerationRequest, Prompt
from gralora_runtime.stream import RequestStream


class Adapters(Protocol):
    """The catalogue and its memory. Every method may be called from any thread."""

    def list(self) -> Sequence[AdapterInfo]: ...
    def get(self, name: str) -> AdapterInfo: ...
    def load(self, name: str, path: Path | None, *, pin: bool = False) -> concurrent.futures.Future[AdapterInfo]: ...
    def unload(self, name: str) -> UnloadResult: ...
    def pin(self, name: str, pinned: bool) -> AdapterInfo: ...


class Engine(Protocol):
    """Generates. Every method but `snapshot` is called on the event loop."""

    dead: asyncio.Event

    @property
    def adapters(self) -> Adapters: ...
    async def submit(self, request: GenerationRequest) -> RequestStream: ...
    def abort(self, request_id: str) -> bool: ...
    async def tokenize(self, prompt: Prompt) -> TokenizeResult: ...
    def info(self) -> EngineInfo: ...
    def load(self) -> EngineLoad: ...
    def snapshot(self) -> EngineSnapshot: ...
    def begin_drain(self) -> None: ...
    async def close(self) -> None: ...


EngineFactory = Callable[[], Awaitable[Engine]]
