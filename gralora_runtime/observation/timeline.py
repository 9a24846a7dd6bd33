"""Where one request was, and since when: marks, each of which begins a stage that lasts until the next one.

The event loop writes until the request is in the scheduler's hands and from its last token on, the engine's thread in
between; each mark is appended whole, so any thread may read.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from gralora_runtime.observation.adapter_way import AdapterWait
from gralora_runtime.observation.holdups import Held, Hold
from gralora_runtime.observation.step_log import NOTHING, LongStep, StepSums
from gralora_runtime.request import Delta, GenerationRequest


class Stage(StrEnum):
    """In the order in which a request meets them."""

    TOKENIZE = "tokenize"
    GRAMMAR = "grammar"  # what its answer has to match is compiled
    ADAPTER = "adapter"  # until it is in the pool
    QUEUE = "queue"
    PREFILL = "prefill"  # its prompt is computed, again after it gave way
    DECODE = "decode"
    PREEMPTED = "preempted"  # it gave way to others, and waits again
    PAUSED = "paused"  # its client does not read
    DELIVERY = "delivery"  # all is computed, and its client reads the rest


class Chunk(NamedTuple):
    """Some of a prompt's tokens, which one step computed."""

    tokens: int
    step_s: float


class Line(NamedTuple):
    """What was in the way until a moment, since the start."""

    held: Held
    started: int  # requests that got a place
    own: int  # of these, of the same tenant


class GivenWay(NamedTuple):
    """Why a request lost its place, or has none yet, and who has it."""

    hold: Hold
    to: str  # a tenant


@dataclass(slots=True, eq=False)
class Mark:
    """A stage begins. What is known of the one before at its end stands here, too."""

    stage: Stage
    at_s: float  # by `time.monotonic`
    steps: StepSums = NOTHING  # until now
    longest: LongStep | None = None  # of the stage before
    line: Line | None = None  # where it waits, and where its waiting ends
    given_way: GivenWay | None = None  # of one that lost its place
    chunks: list[Chunk] = field(default_factory=list)  # of a prompt


@dataclass(slots=True, eq=False)
class Timeline:
    """One request's."""

    request_id: str = ""
    tenant: str = ""
    received_s: float = 0.0  # by `time.monotonic`
    received_at: float = field(default_factory=time.time)  # seconds since the epoch
    marks: list[Mark] = field(default_factory=list)
    adapter: AdapterWait = field(default_factory=AdapterWait)
    asked_for: str = ""  # the adapter, as the request names it
    served_by: str = ""  # the adapter and its version, once they are known
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    preemptions: int = 0
    first_token_s: float | None = None  # since it was received
    outcome: str = ""  # "": it has not ended
    ended_s: float | None = None
    left_s: float | None = None  # when its call had ended, too
    reads_prompt: bool = False  # its last mark is of `PREFILL`

    @classmethod
    def begin(cls, request: GenerationRequest, tenant: str, now_s: float) -> Timeline:
        """`tenant`: whose share it is served from."""
        asked_for = "+".join(request.named_adapters)
        timeline = cls(request_id=request.request_id, tenant=tenant, received_s=now_s, asked_for=asked_for)
        timeline.reach(Stage.TOKENIZE, now_s)
        return timeline

    def reach(self, stage: Stage, now_s: float) -> None:
        """For the event loop, whose stages know no steps."""
        self.marks.append(Mark(stage, now_s))

    def take_on(self, prompt_tokens: int, now_s: float) -> None:
        """It goes to the scheduler."""
        self.prompt_tokens = prompt_tokens
        self.reach(Stage.QUEUE, now_s)

    def deliver(self, delta: Delta, now_s: float) -> None:
        """A delta reaches the event loop."""
        self.output_tokens += len(delta.token_ids)
        if delta.started is not None:
            self.cached_tokens = delta.started.cached_tokens
            self.first_token_s = now_s - self.received_s

    def end(self, outcome: str, now_s: float) -> None:
        self.outcome, self.ended_s = outcome, now_s

    def leave(self) -> None:
        """Its call has ended: there is nobody who reads. Of several calls the last one's word counts."""
        self.left_s = time.monotonic()
