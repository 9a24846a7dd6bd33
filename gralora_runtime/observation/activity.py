"""What an engine is doing at one moment: its counts, and each request under way. Plain values; prompts and answers are
not among them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gralora_runtime.info import EngineLoad
from gralora_runtime.observation.histogram import HistogramCounts
from gralora_runtime.observation.holdups import Hold
from gralora_runtime.observation.timeline import Stage
from gralora_runtime.observation.usage import Tally


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestActivity:
    """One request under way."""

    request_id: str
    tenant: str  # whose share it is served from: of an adapter that is nobody's, "adapter:NAME"
    adapter: str  # as it asked for it until a version is picked; "" is the base model
    version: int  # 0: none is picked yet, the base model, or a mix
    stage: Stage
    age_s: float
    prompt_tokens: int  # 0: not counted yet
    computed_tokens: int  # of prompt and answer
    output_tokens: int
    max_tokens: int  # of the answer; 0: not known yet
    preemptions: int
    hold: Hold | None = None  # of one that waits for a place
    ahead: int = 0  # requests that are to get theirs before it


@dataclass(frozen=True, slots=True, kw_only=True)
class Activity:
    """Counts since the start; what was done lately is the difference of two of them. Histograms are in seconds."""

    load: EngineLoad
    prefill_tokens: int
    decode_tokens: int
    phases: Mapping[str, HistogramCounts]  # of steps
    first_token: HistogramCounts
    inter_token: HistogramCounts
    adapters: Mapping[str, Tally]  # of those with an account of their own
