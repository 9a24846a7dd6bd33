"""One request inside the engine: its tokens, its pages, and when it ends. Mutable; owned by the scheduler."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from enum import Enum

from gralora_runtime.adapters.residency.lease import AdapterLease
from gralora_runtime.detokenizer import Detokenizer
from gralora_runtime.observation.timeline import Timeline
from gralora_runtime.plan import AdapterUse
from gralora_runtime.request import Delta, Finished, FinishReason, Started, StoppingParams
from gralora_runtime.sampling.outcome import SampledToken
from gralora_runtime.sampling.state import SamplerState
from gralora_runtime.scheduling.pages import PageChain, PageKey


class SequenceStatus(Enum):
    """Where a sequence stands in the scheduler."""

    WAITING = "waiting"
    RUNNING = "running"
    PAUSED = "paused"  # until its client reads on
    FINISHED = "finished"


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence:
    """`tokens` is prompt plus output as far as they are known; `num_pending` more are being computed.

    The first `num_computed` of all of them have their keys and values in `pages`, or will when the steps that were
    planned so far have ended.
    """

    request_id: str
    adapter_name: str
    tokens: list[int]
    num_prompt: int
    max_tokens: int
    stopping: StoppingParams
    eos_token_ids: Collection[int]
    lease: AdapterLease
    sampler: SamplerState
    detokenizer: Detokenizer | None  # None: nothing stops at its text, so whoever reads the tokens makes it
    arrival_s: float
    seed: int
    deadline_s: float = math.inf  # by the scheduler's clock
    tenant: str = ""
    weight: float = 1.0  # of the tenant
    priority: int = 0  # higher first, among the tenant's own
    prefix_scope: str = ""
    adapted_from: int = 0  # the first token that its adapter is applied to, see `RowPlan`
    loaded_bytes: int = 0  # of its adapter, if that had to be loaded for this request
    echo_prompt_token_ids: bool = False
    timeline: Timeline = field(default_factory=Timeline)
    status: SequenceStatus = SequenceStatus.WAITING
    num_computed: int = 0
    num_cached: int = 0  # prompt tokens that the first admission found in the prefix cache
    preemptions: int = 0
    num_pending: int = 0
    num_paid: int = 0  # tokens that its tenant was charged for: once, however often they are computed
    number: int = -1  # in order of arrival
    pages: tuple[int, ...] = ()
    page_keys: list[PageKey] = field(default_factory=list)  # of the full pages, in order
    started: Started | None = None
    adapter: AdapterUse = field(init=False)
    chain: PageChain = field(init=False)
    seat: int = -1  # while it runs, see `RowPlan`
    stay: int = -1
    sampled_at: int = -1  # its place among the sampling rows of the step that computes the pending token

    def __post_init__(self) -> None:
        self.adapter = AdapterUse(self.lease.slot, self.lease.generation, self.lease.width)
        self.chain = PageChain(self.lease.digest, self.prefix_scope, self.adapted_from)

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def num_uncomputed(self) -> int:
        return len(self.tokens) + self.num_pending - self.num_computed

    @property
    def has_all_tokens(self) -> bool:
        """With what is pending it has as many as it may have."""
        return self.num_output + self.num_pending >= self.max_tokens

    def begin(self, now_s: float) -> None:
        """Record what the first admission found; reported with the first delta."""
        if self.started is None:
            self.num_cached = self.num_computed
            self.started = Started(
                prompt_tokens=self.num_prompt,
                cached_tokens=self.num_cached,
                queue_time_s=now_s - self.arrival_s,
                seed=self.seed,
                adapter=self.adapter_name,
                adapter_digest=self.lease.digest,
                adapter_version=self.lease.version,
                adapters=self.lease.parts,
                prompt_token_ids=tuple(self.tokens[: self.num_prompt]) if self.echo_prompt_token_ids else (),
            )

    def accept(self, sampled: SampledToken) -> Delta:
        """Append one sampled token; the delta says what it adds and whether the sequence ends with it."""
        token = sampled.token_id
        self.tokens.append(token)
        reason, stop_token = self._stop_by_token(token, completes=sampled.completes)
        text, stop_string = "", None
        if self.detokenizer is not None:
            if stop_token is None:  # the token that stops is reported, but it is no text
                piece = self.detokenizer.push(token)
                text, stop_string = piece.text, piece.stop_string
            if stop_string is not None:
                reason = FinishReason.STOP
            elif reason is not None:
                text += self.detokenizer.flush()
        return Delta(
            text=text,
            token_ids=(token,),
            logprobs=(sampled.logprob,) if sampled.logprob is not None else (),
            started=self.started if self.num_output == 1 else None,
            finished=self.finish(reason, stop_string=stop_string, stop_token_id=stop_token) if reason else None,
        )

    def finish(
        self, reason: FinishReason, *, stop_string: str | None = None, stop_token_id: int | None = None
    ) -> Finished:
        """The record of this sequence's end, with its usage so far."""
        return Finished(
            reason=reason,
            prompt_tokens=self.num_prompt,
            cached_tokens=self.num_cached,
            output_tokens=self.num_output,
            stop_string=stop_string,
            stop_token_id=stop_token_id,
            preemptions=self.preemptions,
        )

    def _stop_by_token(self, token: int, *, completes: bool) -> tuple[FinishReason | None, int | None]:
        if self.num_output >= self.stopping.min_tokens:
            ends = token in self.eos_token_ids and not self.stopping.ignore_eos
            if ends or token in self.stopping.stop_token_ids:
                return FinishReason.STOP, token
        if completes:
            return FinishReason.STOP, None
        if self.num_output >= self.max_tokens:
            return FinishReason.LENGTH, None
        return None, None
