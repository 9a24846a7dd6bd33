"""What tenants are charged for, by a machine's profile: in the time of a prompt's token."""

from __future__ import annotations

from gralora_runtime.scheduling.fairness import Prices
from gralora_server.planner.profile import Profile


def prices_of(profile: Profile) -> Prices:
    """Steps are taken to be full: that is when sharing matters."""
    tokens, rows = profile.settings["max_num_batched_tokens"], profile.settings["max_num_seqs"]
    prompt_token_s = profile.base_s(tokens) / tokens
    return Prices(
        output_token=profile.base_s(rows) / rows / prompt_token_s,
        adapter_byte=profile.load_byte_s * profile.load_slowdown / prompt_token_s,  # steps go on meanwhile, but slower
    )
