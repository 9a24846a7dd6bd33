"""What an engine is doing at one moment: its counts, and each request under way. Plain values; prompts and answers are
not among them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from gralora_runtime.info import EngineLoad
from gralora_runtime.observation.histogram import HistogramCounts
from gralora_runtime.observation.usage import Tally


class Stage(StrEnum):
    """Where a request stands."""

    ARRIVING = "arriving"  # its prompt is being tokenized, or waits for that
    LOADING = "loading"  # its adapter is being brought into the pool
    WAITING = "waiting"  # for a place in the batch
    PROMPT = "prompt"  # its prompt is being computed
    ANSWER = "answer"  # its tokens are
    PAUSED = "paused"  # its client does not read


class Lack(StrEnum):
    """What a request that waits for a place would need."""

    NOTHING = ""
    ROW = "row"  # the batch has as many requests as it may have
    PAGES = "pages"  # of the KV cache
    TURN = "turn"  # others come first


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
    lack: Lack = Lack.NOTHING
    ahead: int = 0  # requests that are to be served before it


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
