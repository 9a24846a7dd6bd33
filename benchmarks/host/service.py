"""The engine behind gRPC, with streaming clients in other processes: what the way to the client costs."""

from __future__ import annotations

import statistics
import sys
from dataclasses import dataclass

from benchmarks.host.engine import PROMPT, check, prompt_of, slots_of
from benchmarks.host.streams import ask, clients_of, environment, window
from benchmarks.worker import Worker


@dataclass(frozen=True, kw_only=True)
class Delivered:
    """Of streams that all decode at once."""

    streams: int
    client_processes: int
    min_tokens_per_message: int
    tokens_per_s: float
    bound_tokens_per_s: float  # what the device alone allows
    share_of_bound: float
    messages_per_token: float
    idle_share: float  # of the device's time
    added_delay_ms: float  # median of messages, from the end of the step that made their newest token to the client


def measure(
    streams: int, step_s: float, *, min_tokens: int = 1, client_processes: int = 1, tokens: int = 256
) -> Delivered:
    """Raises `AssertionError` when a token is not the right one."""
    command = [sys.executable, "-m", "benchmarks.host.server", str(streams), str(1e3 * step_s)]
    slots = slots_of("distinct", streams)
    asked = [
        {
            "token_ids": prompt_of(number), "adapter": str(slot), "max_tokens": tokens,
            "min_tokens_per_message": min_tokens,
        }
        for number, slot in enumerate(slots)
    ]  # fmt: skip
    with (
        Worker(command, environment=environment()) as server,
        clients_of(server.read()["address"], client_processes) as clients,
    ):
        ask(clients, [one | {"max_tokens": 8} for one in asked])  # connections, and code that runs for the first time
        answers = ask(clients, asked)
        device = server.ask({})
    for number, (slot, answer) in enumerate(zip(slots, answers, strict=True)):
        assert len(answer["tokens"]) == tokens, f"{len(answer['tokens'])} of {tokens} tokens came"
        check([*prompt_of(number), *answer["tokens"]], PROMPT, slot)
    found, ends_s = window(answers), device["ends_s"]
    first_steps = [device["first_steps"][str(slot)] for slot in slots]
    # A stream has a token of every step from its first one on.
    delays_s = [one.time_s - ends_s[first_steps[one.stream] + one.last_token] for one in found.messages]
    steps = sum(found.begin_s < end_s <= found.end_s for end_s in ends_s)
    bound = streams / step_s
    return Delivered(
        streams=streams,
        client_processes=client_processes,
        min_tokens_per_message=min_tokens,
        tokens_per_s=round(found.tokens_per_s),
        bound_tokens_per_s=round(bound),
        share_of_bound=round(found.tokens_per_s / bound, 3),
        messages_per_token=round(len(found.messages) / sum(one.num_tokens for one in found.messages), 3),
        idle_share=round(1 - step_s * steps / (found.end_s - found.begin_s), 3),
        added_delay_ms=round(1e3 * statistics.median(delays_s), 2),
    )
