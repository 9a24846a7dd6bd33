"""What tenants are charged for, by a machine's profile: in the time of a prompt's token."""

from __future__ import annotations

import math

from gralora_runtime.errors import ConfigError
from gralora_runtime.scheduling.fairness import Prices
from gralora_server.planner.profile import Profile


def prices_of(profile: Profile) -> Prices:
    """Steps are taken to be full: that is when sharing matters. Raises ConfigError if such steps cost nothing."""
    try:
        prices = _prices(profile)
    except KeyError as cause:
        raise ConfigError(f"the profile of {profile.model!r} lacks settings.{cause.args[0]}") from cause
    except ArithmeticError as cause:
        raise ConfigError(f"by the profile of {profile.model!r} steps take no time: {cause}") from cause
    # What costs less than nothing, or is no number, would be served before everything else, or never.
    if not 0.0 < prices.output_token < math.inf or not 0.0 <= prices.adapter_byte < math.inf:
        raise ConfigError(
            f"by the profile of {profile.model!r} an output's token costs {prices.output_token:g} and an adapter's "
            f"byte {prices.adapter_byte:g} of a prompt's tokens: measure it again"
        )
    return prices


def _prices(profile: Profile) -> Prices:
    tokens, rows = profile.settings["max_num_batched_tokens"], profile.settings["max_num_seqs"]
    prompt_token_s = profile.base_s(tokens) / tokens
    return Prices(
        output_token=profile.base_s(rows) / rows / prompt_token_s,
        adapter_byte=profile.load_byte_s * profile.load_slowdown / prompt_token_s,  # steps go on meanwhile, but slower
    )
