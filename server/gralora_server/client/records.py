"""What the client returns: plain frozen values. What server and client mean alike is `gralora_runtime`'s vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from gralora_runtime.adapters.catalogue.store import AdapterState
from gralora_runtime.info import EngineInfo
from gralora_runtime.request import Delta, FinishReason, ServedAdapter, TokenLogprob

StreamDelta = Delta


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens that a request took."""

    prompt_tokens: int
    cached_tokens: int  # of the prompt, found in the prefix cache
    output_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """A whole generation: what came, what served it, and how long it took as seen from here."""

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]  # empty unless asked for
    finish_reason: FinishReason
    stop_string: str | None  # which one matched
    stop_token_id: int | None  # which one matched
    usage: Usage
    adapter: str  # that really served it; "": the base model
    adapter_digest: str
    adapter_version: int
    adapters: tuple[ServedAdapter, ...]  # of a sum of several: what it is made of
    seed: int  # asked for, or drawn by the server: repeats the generation
    prompt_token_ids: tuple[int, ...]  # empty unless asked for
    queue_time_s: float
    preemptions: int
    ttft_s: float | None  # from the call to the first message with a token; None when it was not streamed
    total_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterVersion:
    """One content that an adapter has had, or has."""

    number: int
    digest: str
    state: AdapterState
    pinned: bool
    in_flight: int
    created: datetime
    last_used: datetime | None
    error: str
    warnings: tuple[str, ...]  # what is odd about it, though it is served


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterNews:
    """What a watch tells: adapters as they are now, and names that are registered no more."""

    adapters: tuple[Adapter, ...]
    removed: tuple[str, ...]
    synced: bool  # all has been told that was so when the watch began


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """One adapter as the server sees it now: a name, and the version that it stands for.

    Numbers are 0 while its files cannot be read.
    """

    name: str
    source: str
    digest: str
    state: AdapterState
    pinned: bool
    in_flight: int
    kind: str
    rank: int
    k: int
    hybrid_rank: int
    equivalent_rank: int
    scale: float
    num_modules: int
    pool_bytes: int
    base_model: str
    last_used: datetime | None
    error: str
    version: int
    previous_version: int  # that a rollback returns to; 0: none
    follows: bool  # new content of its source is promoted by itself
    canary_version: int  # 0: none
    canary_share: float
    versions: tuple[AdapterVersion, ...]
    warnings: tuple[str, ...]  # what is odd about that version, though it is served


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantUsage:
    """What one tenant used of one adapter, ever. Tenant "" is the operator."""

    tenant: str
    adapter: str  # whatever its version; "" is the base model, "(others)" all that have no row of their own
    requests: int
    prompt_tokens: int
    cached_tokens: int  # of the prompts, found in the prefix cache
    output_tokens: int
    refused: int  # requests and uploads, for a quota or a full queue
    upload_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerInfo(EngineInfo):
    """What the server serves and how it was set up."""

    api_version: str
