"""Whether one more request may come in, and what those that came teach of the next. Lives on the event loop's thread.

A request is looked at when it comes, by its tenant alone; as one of those under way; and once its prompt has been
counted. What it adds to the backlog is taken back by `leave`, whatever became of it.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from gralora_runtime.config import EngineConfig
from gralora_runtime.errors import DeadlineExceededError, QueueFullError, TooLateError
from gralora_runtime.info import EngineInfo
from gralora_runtime.intake.backlog import Backlog, Place, TenantBacklog
from gralora_runtime.intake.forecast import Estimate, Forecast
from gralora_runtime.intake.promises import Promises
from gralora_runtime.observation.step_times import StepTimes
from gralora_runtime.request import Finished, FinishReason, GenerationRequest

TIMES_THE_CACHE = 16  # tokens of prompts that may wait, over those that the KV cache holds


@dataclass(slots=True, eq=False)
class Arrival:
    """One request that came in, until it leaves. Times by `time.monotonic`."""

    request: GenerationRequest
    place: Place
    arrived_s: float
    deadline_s: float
    is_expected: bool = False  # it had been told to come now
    estimate: Estimate | None = None

    @property
    def tenant(self) -> str:
        return self.place.line.tenant


class Entrance:
    """Refuses in time, or lets in."""

    def __init__(self, config: EngineConfig, info: EngineInfo, times: StepTimes) -> None:
        self.first_token_s = config.first_token_s  # the objective, which may change at any time
        self._backlog = Backlog(
            max_requests=config.max_num_seqs + config.max_queue,
            max_tokens=config.max_queue_tokens or TIMES_THE_CACHE * info.num_pages * info.page_size,
        )
        self._promises = Promises()
        self._forecast = Forecast(
            self._backlog,
            times,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
        )

    def arrive(self, request: GenerationRequest) -> Arrival:
        """It is one of those under way from here on. Raises QueueFullError if one more would be too many."""
        now_s = time.monotonic()
        line = self._backlog.line(tenant_of(request), request.weight)
        is_expected = self._promises.came(line.tenant, request.request_id, now_s)
        problem = self._backlog.full_of_requests(request, line)
        if problem is not None:
            raise QueueFullError(problem, self._retry_s(request, line, 0.0, is_expected=is_expected))
        arrival = self._arrive(request, now_s)
        arrival.is_expected = is_expected
        return arrival

    def arrive_for_trial(self, request: GenerationRequest) -> Arrival:
        """As `arrive`, of one that is not refused: others wait for its outcome."""
        return self._arrive(request, time.monotonic())

    def refuse_when_late(self, arrival: Arrival, num_prompt: int) -> None:
        """Raises TooLateError if its deadline or the objective cannot be met, as far as can be told."""
        now_s = time.monotonic()
        request, line = arrival.request, arrival.place.line
        estimate = self._estimate(arrival, num_prompt, now_s)
        if estimate is not None and (others := self._to_come(arrival, estimate, now_s)):
            estimate = self._estimate(arrival, num_prompt, now_s, others)
        arrival.estimate = estimate
        if estimate is None:
            return
        left_s = arrival.deadline_s - now_s
        if left_s <= 0:
            raise DeadlineExceededError(request.request_id)
        objective_s = math.inf if self.first_token_s is None else self.first_token_s
        for what, expected_s, limit_s in (
            ("first token", estimate.first_token_s, min(left_s, objective_s)),
            ("last token", estimate.last_token_s, left_s),
        ):
            if expected_s > limit_s:
                raise TooLateError(
                    request.request_id,
                    what=what,
                    expected_s=expected_s,
                    limit_s=limit_s,
                    retry_after_s=self._retry_s(request, line, expected_s - limit_s, is_expected=arrival.is_expected),
                )

    def count_prompt(self, arrival: Arrival, num_prompt: int) -> None:
        """Its prompt has so many tokens. Raises QueueFullError or TooLateError."""
        problem = self._backlog.full_of_tokens(arrival.request, arrival.place, num_prompt)
        if problem is not None:
            retry_s = self._retry_s(arrival.request, arrival.place.line, 0.0, is_expected=arrival.is_expected)
            raise QueueFullError(problem, retry_s)
        self._backlog.count(arrival.place, num_prompt)
        self.refuse_when_late(arrival, num_prompt)
        self._forecast.take_on(num_prompt, time.monotonic())

    def count_trial(self, arrival: Arrival, num_prompt: int) -> None:
        """As `count_prompt`, of one that is not refused: others wait for its outcome."""
        self._backlog.count(arrival.place, num_prompt)
        self._forecast.take_on(num_prompt, time.monotonic())

    def note_first_token(self, arrival: Arrival, now_s: float) -> float | None:
        """Returns how long it took over what was foreseen; None if nothing was."""
        self._backlog.start(arrival.place)
        if arrival.estimate is None:
            return None
        return (now_s - arrival.arrived_s) / max(arrival.estimate.first_token_s, 1e-3)

    def learn(self, arrival: Arrival, finished: Finished | None, *, max_tokens: int, now_s: float) -> None:
        """From an answer, how long the next ones will be; and how right the forecast was. None: it failed."""
        is_whole = finished is not None and finished.reason.is_whole
        if arrival.estimate is not None and (is_whole or now_s >= arrival.deadline_s):
            self._forecast.compare(arrival.estimate, now_s - arrival.arrived_s, ended=is_whole)
        if finished is not None and finished.reason is not FinishReason.CANCELLED:
            self._forecast.learn(
                arrival.tenant,
                num_output=finished.output_tokens,
                max_tokens=max_tokens,
                whole=finished.reason is not FinishReason.DEADLINE,
            )

    def leave(self, arrival: Arrival) -> None:
        """It has ended, or was refused."""
        self._backlog.leave(arrival.place)

    def _arrive(self, request: GenerationRequest, now_s: float) -> Arrival:
        deadline_s = math.inf if request.timeout_s is None else now_s + request.timeout_s
        return Arrival(request, self._backlog.enter(tenant_of(request), request.weight), now_s, deadline_s)

    def _estimate(self, arrival: Arrival, num_prompt: int, now_s: float, others: float = 0.0) -> Estimate | None:
        return self._forecast.estimate(
            arrival.place, arrival.request.stopping, num_prompt=num_prompt, now_s=now_s, others=others
        )

    def _to_come(self, arrival: Arrival, estimate: Estimate, now_s: float) -> float:
        """Of its tenant, before its last token: it would stay until then, in their way."""
        if arrival.is_expected:
            return 0.0
        return self._promises.expected(arrival.tenant, estimate.last_token_s, now_s)

    def _retry_s(
        self, request: GenerationRequest, line: TenantBacklog, soonest_s: float, *, is_expected: bool
    ) -> float:
        now_s = time.monotonic()
        return self._promises.tell(
            line.tenant,
            request.request_id,
            soonest_s=soonest_s,
            turn_s=self._forecast.turn_s(line, now_s),
            is_expected=is_expected,
            now_s=now_s,
        )


def tenant_of(request: GenerationRequest) -> str:
    """Whose share it is served from. An adapter that is nobody's is a tenant of its own, all its versions together; and
    so is a mix, whatever its weights."""
    return request.tenant or f"adapter:{'+'.join(name.partition('@')[0] for name in request.named_adapters)}"
