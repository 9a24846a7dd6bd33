"""The engine behind gRPC, with streaming clients in other processes: what the way to the client costs."""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.host.device import VOCAB
from benchmarks.host.engine import PROMPT, check, slots_of
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
    added_delay_ms: float  # median, from the end of a step to the client


def measure(
    streams: int, step_s: float, *, min_tokens: int = 1, client_processes: int = 1, tokens: int = 256
) -> Delivered:
    """Raises `AssertionError` when a token is not the right one."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with ExitStack() as stack:
        server = stack.enter_context(
            Worker(
                [sys.executable, "-m", "benchmarks.host.server", str(streams), str(1e3 * step_s)],
                environment=environment,
            )
        )
        address = server.read()["address"]
        command = [sys.executable, "-m", "benchmarks.host.client", address]
        clients = [stack.enter_context(Worker(command, environment=environment)) for _ in range(client_processes)]
        asked = [_asked(number, slot, min_tokens, tokens) for number, slot in enumerate(slots_of("distinct", streams))]
        _run(clients, [one | {"max_tokens": 8} for one in asked])  # connections, and code that runs for the first time
        server.ask({})
        answers = _run(clients, asked)
        device = server.ask({})
    for one, answer in zip(asked, answers, strict=True):
        assert len(answer["tokens"]) == tokens, f"{len(answer['tokens'])} of {tokens} tokens came"
        check([*one["token_ids"], *answer["tokens"]], PROMPT, int(one["adapter"]))
    return _delivered(answers, device, step_s, min_tokens, client_processes)


def _asked(number: int, slot: int, min_tokens: int, tokens: int) -> dict[str, Any]:
    prompt = np.random.default_rng(number).integers(0, VOCAB, PROMPT).tolist()
    return {
        "token_ids": prompt, "adapter": str(slot), "max_tokens": tokens, "min_tokens_per_message": min_tokens,
    }  # fmt: skip


def _run(clients: Sequence[Worker], asked: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The answers in order, of streams shared out among the clients."""
    with ThreadPoolExecutor(len(clients)) as threads:
        parts = list(
            threads.map(
                lambda number: clients[number].ask({"streams": asked[number :: len(clients)]})["streams"],
                range(len(clients)),
            )
        )
    answers: list[dict[str, Any]] = [{}] * len(asked)
    for number, part in enumerate(parts):
        answers[number :: len(clients)] = part
    return answers


def _delivered(
    answers: Sequence[dict[str, Any]], device: dict[str, Any], step_s: float, min_tokens: int, client_processes: int
) -> Delivered:
    """Over the time in which all streams decode: from the last first message to the first last one."""
    begin_s = max(answer["times_s"][0] for answer in answers)
    end_s = min(answer["times_s"][-1] for answer in answers)
    found = [
        (time_s, count)
        for answer in answers
        for time_s, count in zip(answer["times_s"], answer["counts"], strict=True)
        if begin_s < time_s <= end_s and count
    ]
    num_tokens = sum(count for _, count in found)
    ends_s = np.array(device["ends_s"])
    # A message cannot come before the step that made its newest token: the delay is from the latest that had ended.
    places = np.searchsorted(ends_s, [time_s for time_s, _ in found], side="right") - 1
    delays_s = np.array([time_s for time_s, _ in found]) - ends_s[places]
    inside = (ends_s > begin_s) & (ends_s <= end_s)
    bound = len(answers) / step_s
    return Delivered(
        streams=len(answers),
        client_processes=client_processes,
        min_tokens_per_message=min_tokens,
        tokens_per_s=round(num_tokens / (end_s - begin_s)),
        bound_tokens_per_s=round(bound),
        share_of_bound=round(num_tokens / (end_s - begin_s) / bound, 3),
        messages_per_token=round(len(found) / num_tokens, 3),
        idle_share=round(1 - step_s * int(inside.sum()) / (end_s - begin_s), 3),
        added_delay_ms=round(1e3 * statistics.median(delays_s.tolist()), 2),
    )
