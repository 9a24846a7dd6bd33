"""Streaming clients in processes of their own, and what came to them. Knows no engine; see `client` for the lines."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from benchmarks.worker import Worker

Answer = dict[str, Any]


class Message(NamedTuple):
    """One message with tokens, of the stream with that number."""

    stream: int
    time_s: float
    last_token: int  # number of its newest token in the stream, from 0
    num_tokens: int


class Window(NamedTuple):
    """The time in which all streams decode: from the last first message to the first last one."""

    begin_s: float
    end_s: float
    messages: tuple[Message, ...]

    @property
    def tokens_per_s(self) -> float:
        return sum(message.num_tokens for message in self.messages) / (self.end_s - self.begin_s)


def environment() -> dict[str, str]:
    """For a process that has to find what this one finds."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


@contextmanager
def clients_of(address: str, count: int) -> Iterator[Sequence[Worker]]:
    """So many processes of clients."""
    command = [sys.executable, "-m", "benchmarks.host.client", address]
    with ExitStack() as stack:
        yield [stack.enter_context(Worker(command, environment=environment())) for _ in range(count)]


def ask(clients: Sequence[Worker], asked: Sequence[dict[str, Any]]) -> list[Answer]:
    """All streams at once, shared out among the clients; the answers in order."""

    def of_client(number: int) -> list[Answer]:
        found: list[Answer] = clients[number].ask({"streams": asked[number :: len(clients)]})["streams"]
        return found

    with ThreadPoolExecutor(len(clients)) as threads:
        parts = list(threads.map(of_client, range(len(clients))))
    answers: list[Answer] = [{}] * len(asked)
    for number, part in enumerate(parts):
        answers[number :: len(clients)] = part
    return answers


def window(answers: Sequence[Answer]) -> Window:
    """What came while all of them decoded."""
    begin_s = max(answer["times_s"][0] for answer in answers)
    end_s = min(answer["times_s"][-1] for answer in answers)
    messages = []
    for number, answer in enumerate(answers):
        last_token = -1
        for time_s, count in zip(answer["times_s"], answer["counts"], strict=True):
            last_token += count
            if begin_s < time_s <= end_s and count:
                messages.append(Message(number, time_s, last_token, count))
    return Window(begin_s, end_s, tuple(messages))
