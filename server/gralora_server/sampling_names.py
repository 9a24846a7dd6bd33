"""Sampling parameters as vLLM's clients name them, for all protocols that follow it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import MappingProxyType

from gralora_runtime.errors import InvalidRequestError
from gralora_server.json_values import shown

# Called what ours are called.
REALS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
# What is so here in any case, and may be said.
FIXED: Mapping[str, bool | int] = MappingProxyType(
    {
        "n": 1,
        "best_of": 1,
        "use_beam_search": False,
        "early_stopping": False,
        "length_penalty": 1,
        "skip_special_tokens": True,
        "include_stop_str_in_output": False,
    }
)


def check_fixed(name: str, value: object) -> None:
    """`name`: of one of `FIXED`. Raises InvalidRequestError for any other value than its own."""
    if value != FIXED[name]:
        raise InvalidRequestError(name, shown(value), f"can only be {json.dumps(FIXED[name])} here")
