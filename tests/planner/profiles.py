"""A profile whose figures are round, so that a test can say what must come out."""

from __future__ import annotations

from gralora_server.planner.profile import Profile, StepPoint
from gralora_server.planner.simulate import ServerPlan

STEP_S = 0.01  # of one token
TOKEN_S = 0.001  # for each further one


def profile(**changes: object) -> Profile:
    fields: dict[str, object] = {
        "model": "made-up",
        "made_at": "2026-01-01T00:00:00+00:00",
        "machine": {"CPU": "none", "cores": "2"},
        "settings": {"max_num_seqs": 4, "max_num_batched_tokens": 64, "page_size": 16},
        "adapters": "r16k2",
        "step_s": (StepPoint(tokens=1, seconds=STEP_S), StepPoint(tokens=101, seconds=STEP_S + 100 * TOKEN_S)),
        "adapter_byte_s": 0.0,
        "adapter_token_byte_s": 0.0,
        "context_token_s": 0.0,
        "prefill_context_s": 0.0,
        "request_s": 0.0,
        "load_byte_s": 0.0,
        "load_slowdown": 0.0,
        "server_bytes": 1000,
        "kv_token_bytes": 1,
    }
    return Profile.model_validate(fields | changes)


def server(**changes: int) -> ServerPlan:
    sizes = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "page_size": 16, "num_pages": 1000}
    return ServerPlan(**(sizes | {"adapter_pool_bytes": 1 << 30, "max_adapter_slots": 4096} | changes))
