"""What an engine reports about itself: constants, current load, and the answer to a tokenize call. Plain values."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """What "auto" and None in the configuration became. Constant while the engine runs."""

    model: str
    model_type: str
    model_digest: str
    dtype: str
    device: str
    kernel_backend: str
    max_model_len: int  # tokens, prompt and output together
    max_num_seqs: int
    max_num_batched_tokens: int
    page_size: int  # tokens
    num_pages: int
    vocab_size: int
    adapter_pool_bytes: int
    max_adapter_slots: int
    version: str
    tool_format: str = ""  # how the model writes its calls of tools; "": in no known way


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLoad:
    """One moment. pages_free + pages_cached + pages_leased = pages_total; counters run from the start."""

    running: int
    waiting: int  # for pages or a row
    waiting_for_adapter: int
    paused: int  # until their clients read on
    pages_total: int
    pages_free: int
    pages_cached: int  # held by the prefix cache alone: free when needed
    pages_leased: int
    adapter_leases: int
    adapter_slots_used: int
    adapter_slots_total: int
    adapter_pool_bytes_used: int
    adapter_pool_bytes_total: int
    steps: int
    generated_tokens: int
    preemptions: int
    pauses: int
    prefix_hit_tokens: int
    request_failures: int  # requests that ended because our code failed on them alone
    step_failures: int  # steps whose shared part failed, with all their requests


@dataclass(frozen=True, slots=True)
class TokenizeResult:
    """A prompt as the model would see it."""

    token_ids: tuple[int, ...]
    max_model_len: int
