"""How much of everything one run takes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Tokens, requests and seconds as the names say."""

    rows: int = 32
    # Two that always want more: one has fifty times the other's requests, and long prompts.
    many_requests: int = 500
    many_prompt: int = 192
    many_output: int = 8
    few_streams: int = 10  # of the other one, which asks again as soon as it has an answer
    few_prompt: int = 16
    few_output: int = 24
    share_s: float = 90.0
    # A flood of streams, and one that asks now and then.
    flood_streams: int = 100
    flood_prompt: int = 64
    flood_output: int = 64
    light_requests: int = 40
    light_prompt: int = 16
    light_output: int = 8
    light_pause_s: float = 0.5
    # The same requests for one tenant, first come first served, and for eight.
    batch_requests: int = 96
    rounds: int = 3


QUICK = Plan(
    rows=8, many_requests=60, share_s=3.0, flood_streams=30, flood_output=24, light_requests=6, light_pause_s=0.05,
    batch_requests=24, rounds=1,
)  # fmt: skip
