"""What the event loop writes down about requests: how long each waited, how it ended, and for which adapter."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass

from gralora_runtime.errors import GraloraError
from gralora_runtime.observation.histogram import RATIO, REQUEST_S, TOKEN_S, Histogram, HistogramCounts, Owner
from gralora_runtime.observation.usage import AdapterAccounts, Tally
from gralora_runtime.request import Delta


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestCounts:
    """One moment. received = all of `ended` + those under way. Histograms are in seconds, `forecast` is a ratio."""

    received: int
    ended: Mapping[str, int]  # by outcome
    queue: HistogramCounts
    adapter_wait: HistogramCounts
    first_token: HistogramCounts
    forecast: HistogramCounts  # how long the first token took, over what was foretold
    inter_token: HistogramCounts
    total: HistogramCounts
    adapters: Mapping[str, Tally]


class RequestObservation:
    """Written by the event loop's thread, read by any."""

    def __init__(self, max_named_adapters: int) -> None:
        self.accounts = AdapterAccounts(max_named_adapters)
        self.adapter_wait = Histogram(REQUEST_S)
        self.queue = Histogram(REQUEST_S)
        self.first_token = Histogram(REQUEST_S)
        self.forecast = Histogram(RATIO)
        self.inter_token = Histogram(TOKEN_S)
        self.total = Histogram(REQUEST_S)
        self._received = 0
        self._ended: dict[str, int] = {}

    def receive(self) -> None:
        """A request came. What follows is a call of `end`, and before it of the meter's methods."""
        self._received += 1

    def meter(self, submitted_s: float, whose: Owner | None = None) -> RequestMeter:
        """`whose`: its times are examples."""
        return RequestMeter(self, submitted_s, whose)

    def end(self, outcome: str) -> None:
        self._ended[outcome] = self._ended.get(outcome, 0) + 1

    def read(self) -> RequestCounts:
        return RequestCounts(
            ended=self._ended.copy(),  # before `received`, so that no request ends before it came
            received=self._received,
            queue=self.queue.read(),
            adapter_wait=self.adapter_wait.read(),
            first_token=self.first_token.read(),
            forecast=self.forecast.read(),
            inter_token=self.inter_token.read(),
            total=self.total.read(),
            adapters=self.accounts.read(),
        )


class RequestMeter:
    """Follows one request from its submission to its last delta. Times are of one monotonic clock, in seconds."""

    __slots__ = ("_account", "_last_s", "_observed", "_submitted_s", "_whose")

    def __init__(self, observed: RequestObservation, submitted_s: float, whose: Owner | None = None) -> None:
        self._observed = observed
        self._submitted_s = submitted_s
        self._whose = whose
        self._account = observed.accounts.base
        self._last_s = submitted_s

    def admit(self, adapter: str, num_prompt: int) -> None:
        """The adapter is there, and the request goes to the scheduler."""
        self._account = self._observed.accounts.use(adapter)
        self._account.tally.prompt_tokens += num_prompt

    def deliver(self, delta: Delta, now_s: float) -> None:
        """A delta reaches the event loop. The first token's delay is that since the submission."""
        num_tokens = len(delta.token_ids)
        if delta.started is not None:
            self._observed.queue.observe(delta.started.queue_time_s, whose=self._whose)
            self._observed.first_token.observe(now_s - self._submitted_s, whose=self._whose)
        elif num_tokens:
            between_s = (now_s - self._last_s) / num_tokens
            self._observed.inter_token.observe(between_s, num_tokens, whose=self._whose)
        if num_tokens:
            self._last_s = now_s
            self._account.tally.generated_tokens += num_tokens
        if delta.finished is not None:
            self._observed.total.observe(now_s - self._submitted_s, whose=self._whose)


def outcome_of(error: BaseException) -> str:
    """The reason of our own errors, in lower case. A task that is cancelled is a client that left."""
    if isinstance(error, GraloraError):
        return error.reason.lower()
    return "cancelled" if isinstance(error, asyncio.CancelledError) else "internal"
