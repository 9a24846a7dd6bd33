"""Everything that can be said about an engine at one moment, for whoever publishes it. Plain values."""

from __future__ import annotations

from dataclasses import dataclass

from gralora_runtime.adapters.info import AdapterResidency, AdapterStats
from gralora_runtime.info import EngineInfo, EngineLoad
from gralora_runtime.observation.requests import RequestCounts
from gralora_runtime.observation.steps import StepCounts


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSnapshot:
    """Its parts are read one after another while the engine runs: each is right, sums over several may lag."""

    info: EngineInfo
    load: EngineLoad
    prefill_tokens: int
    decode_tokens: int
    steps: StepCounts
    requests: RequestCounts
    adapters: AdapterStats
    residency: AdapterResidency
    running_adapters: frozenset[str]  # of requests in the batch
    waiting_adapters: frozenset[str]  # of requests that wait for the adapter or for the batch
