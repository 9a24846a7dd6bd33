"""What the client returns: plain frozen values. What server and client mean alike is `gralora_runtime`'s vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from gralora_runtime.adapters.catalogue.store import AdapterState
from gralora_runtime.info import EngineInfo
from gralora_runtime.observation.activity import Activity, RequestActivity
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
class ServerActivity:
    """What a server is doing: counts since its start, and every request under way."""

    activity: Activity
    requests: tuple[RequestActivity, ...]


@dataclass(frozen=True, slots=True)
class HeldUp:
    """How long something was in the way: "place", "pages" or "turn"."""

    by: str
    duration_s: float


@dataclass(frozen=True, slots=True)
class PromptChunk:
    """Some of a prompt's tokens, and what the step took that computed them."""

    tokens: int
    step_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LongestPause:
    """The pause before a token, and what was computed in it."""

    duration_s: float
    rows: int
    prompt_tokens: int
    prompt_of: str  # the request with most of those


@dataclass(frozen=True, slots=True, kw_only=True)
class ExplanationPart:
    """A stretch of a request's time. See `TimelinePart` of the API."""

    stage: str
    station: str
    start_s: float
    duration_s: float
    num_bytes: int
    held_up: tuple[HeldUp, ...]
    ahead: int
    own_ahead: int
    lacks: str
    lacks_for: str
    chunks: tuple[PromptChunk, ...]
    steps: int
    mean_rows: float
    prompt_steps: int
    prompt_steps_s: float
    longest_pause: LongestPause | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """Where a request's time went. The parts add up to `total_s`."""

    request_id: str
    tenant: str
    adapter: str
    received: datetime
    total_s: float
    outcome: str  # "": it runs
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    preemptions: int
    first_token_s: float | None
    parts: tuple[ExplanationPart, ...]
    cause: str
    says: str
    advice: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerInfo(EngineInfo):
    """What the server serves and how it was set up."""

    api_version: str
