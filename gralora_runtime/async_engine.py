"""The engine as servers use it: asyncio on the outside, one stepping thread inside. Knows no transport.

All state here belongs to the event loop's thread. The engine's thread reaches it only through
`call_soon_threadsafe`, once per step.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import math
import os
import secrets
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass

from gralora_kernels.stages import StartStage, untold
from gralora_runtime.adapters.catalogue.names import account_of, numbered, unweighted
from gralora_runtime.adapters.checkpoint.golden import GoldenAnswer, GoldenCase
from gralora_runtime.adapters.checkpoint.spec import rejected
from gralora_runtime.adapters.manager import AdapterManager
from gralora_runtime.adapters.residency.lease import AdapterLease
from gralora_runtime.assemble import EngineParts, assemble
from gralora_runtime.config import EngineConfig
from gralora_runtime.errors import (
    DeadlineExceededError,
    DrainingError,
    EngineDeadError,
    GraloraError,
    InvalidRequestError,
    NumericalError,
    RequestCancelledError,
)
from gralora_runtime.failure import request_failed
from gralora_runtime.info import EngineInfo, EngineLoad, TokenizeResult
from gralora_runtime.intake.entrance import Arrival, Entrance
from gralora_runtime.intake.invocation import first_adapted
from gralora_runtime.intake.own_tokens import OwnTokenizers
from gralora_runtime.intake.rules import Rules, check_fits, has_added, rules_of
from gralora_runtime.intake.tokenizing import Tokenizing
from gralora_runtime.model.tokenization import check_ids
from gralora_runtime.observation.activity import Activity, RequestActivity
from gralora_runtime.observation.histogram import Owner
from gralora_runtime.observation.requests import RequestMeter, RequestObservation, outcome_of
from gralora_runtime.observation.snapshot import EngineSnapshot
from gralora_runtime.observation.timeline import Stage, Timeline
from gralora_runtime.observation.timelines import Timelines
from gralora_runtime.observation.usage import OTHER
from gralora_runtime.plan import NEVER
from gralora_runtime.request import (
    GenerationRequest,
    Prompt,
    ResponseParams,
    SamplingParams,
    StoppingParams,
)
from gralora_runtime.scheduling.fairness import Prices
from gralora_runtime.scheduling.onlooker import look
from gralora_runtime.scheduling.scheduler import StepOutput
from gralora_runtime.scheduling.sequence import Sequence
from gralora_runtime.stepping.engine_thread import EngineThread
from gralora_runtime.stream import RequestStream, merge_deltas
from gralora_runtime.structured.compiler import Compiler
from gralora_runtime.structured.matcher import Compiled
from gralora_runtime.structured.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

# How far behind the likeliest token one may be, by its log probability, and have been chosen where sums are rounded
# otherwise: logits agree to 1e-3 in float32; 16 bits leave logits of 16 to 32 an eighth between two values.
TIE = 2e-3
TIE_OF_16_BITS = 0.125
NUM_RIVALS = 5


@dataclass(slots=True, eq=False)
class _Entry:
    """A request from submission to its last delta."""

    arrival: Arrival
    stream: RequestStream
    observed: RequestObservation
    meter: RequestMeter
    timeline: Timeline
    aborted: asyncio.Event  # wakes a submission that still waits for its adapter
    max_tokens: int = 1
    num_prompt: int = 0  # tokens, once they are counted
    queued: bool = False  # the scheduler has it
    loaded_bytes: int = 0  # of its adapter, which was not there yet
    given_up: str | None = None  # the outcome, when an output could not be delivered: what comes after is not heard


class AsyncEngine:
    """Submit requests, get streams of deltas. Build it with `start`."""

    def __init__(
        self, parts: EngineParts, config: EngineConfig, turn: AbstractContextManager[object] | None = None
    ) -> None:
        """`turn`: see `EngineThread`."""
        self.adapters: AdapterManager = parts.adapters
        self.dead = asyncio.Event()
        self._parts = parts
        self._config = config
        self._loop = asyncio.get_running_loop()
        self._entries: dict[str, _Entry] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = False
        self._closing = False
        self.requests = RequestObservation(config.max_named_adapters)
        self.timelines = Timelines(config.max_explained_requests)
        self._trials = RequestObservation(0)  # golden prompts are nobody's requests
        self._entrance = Entrance(config, parts.info, parts.engine.times)
        self._tokenizing = Tokenizing(parts.prompts)
        self._own_tokenizers = OwnTokenizers(parts.base)
        self._compiler = Compiler(self._make_vocabulary)
        self._unsound: set[str] = set()  # versions whose last answer was no numbers
        self._thread = EngineThread(
            parts.engine,
            prepare=parts.prepare_thread,
            deliver=lambda outputs: self._call_soon(self._deliver, outputs),
            on_death=lambda: self._call_soon(self._die),
            turn=turn,
        )
        self._thread.start()
        self.adapters.examine_with(self._examine_soon)

    @classmethod
    async def start(cls, config: EngineConfig, stage: StartStage = untold) -> AsyncEngine:
        """Load the model off the loop and start stepping. Raises `ConfigError` or `ModelUnsupportedError`.

        `stage`: see `assemble`.
        """
        parts = await asyncio.to_thread(assemble, config, stage=stage)
        return cls(parts, config)

    @property
    def first_token_s(self) -> float | None:
        """Who would wait longer for the first token is refused. It may be changed at any time."""
        return self._entrance.first_token_s

    @first_token_s.setter
    def first_token_s(self, limit_s: float | None) -> None:
        self._entrance.first_token_s = limit_s

    async def submit(self, request: GenerationRequest) -> RequestStream:
        """Admit a request: tokenized, checked, and its adapter resident. Raises a `GraloraError` if it cannot be."""
        self.requests.receive()
        try:
            return await self._submit(request)
        except BaseException as error:
            self.requests.end(outcome_of(error))
            raise

    async def _submit(self, request: GenerationRequest) -> RequestStream:
        if self._draining:
            raise EngineDeadError if self.dead.is_set() else DrainingError
        entry = self._enter(request, self.requests)
        try:
            check_fits(request, self._parts.info)  # first: who hears that it is too late comes again
            self._entrance.refuse_when_late(entry.arrival, num_prompt=1)
            sequence = await self._prepare(entry)
        except BaseException as error:
            entry.timeline.end(outcome_of(error), time.monotonic())
            self._leave(request.request_id)
            raise
        self._queue(entry, sequence)
        return entry.stream

    def _queue(self, entry: _Entry, sequence: Sequence) -> None:
        entry.meter.admit(unweighted(entry.stream.served_by), sequence.num_prompt)
        entry.timeline.take_on(sequence.num_prompt, time.monotonic())
        entry.queued = True
        self._thread.post(sequence.request_id, lambda scheduler: scheduler.add(sequence))

    def abort(self, request_id: str) -> bool:
        """End a request wherever it stands; False if there is none of that id."""
        entry = self._entries.get(request_id)
        if entry is None:
            return False
        if entry.queued:
            self._thread.post(request_id, lambda scheduler: scheduler.cancel(request_id))
        else:
            entry.aborted.set()
        return True

    def _hold(self, request_id: str, held: bool) -> None:
        self._thread.post(
            request_id, lambda scheduler: scheduler.pause(request_id) if held else scheduler.resume(request_id)
        )

    async def tokenize(self, prompt: Prompt) -> TokenizeResult:
        """Token ids as `submit` would compute them."""
        token_ids = await self._tokenizing.encode(prompt)
        return TokenizeResult(token_ids=tuple(token_ids), max_model_len=self._parts.info.max_model_len)

    def token_text(self, token_id: int) -> str:
        """Of one token alone, for those who show tokens."""
        return self._tokenizing.text_of(token_id)

    @property
    def busy_since_s(self) -> float | None:
        """When the step that runs now began, by `time.monotonic`, from any thread; None if there is nothing to do."""
        return self._thread.busy_since_s

    def info(self) -> EngineInfo:
        """What was decided at start."""
        return self._parts.info

    def load(self) -> EngineLoad:
        """What is in use now, from any thread. Counts are read while the engine runs: each is right, sums may lag."""
        engine, pool = self._parts.engine, self.adapters.stats()
        scheduler = engine.scheduler
        pages = scheduler.pages.counts()
        return EngineLoad(
            running=scheduler.num_running,
            waiting=scheduler.num_waiting,
            waiting_for_adapter=sum(not entry.queued for entry in self._entries.copy().values()),
            paused=scheduler.num_paused,
            pages_total=pages.total,
            pages_free=pages.free,
            pages_cached=pages.cached,
            pages_leased=pages.leased,
            adapter_leases=pool.leases,
            adapter_slots_used=pool.slots_used,
            adapter_slots_total=pool.slots_total,
            adapter_pool_bytes_used=pool.pool_bytes_used,
            adapter_pool_bytes_total=pool.pool_bytes_total,
            steps=engine.num_steps,
            generated_tokens=scheduler.counters.generated_tokens,
            preemptions=scheduler.counters.preemptions,
            pauses=scheduler.counters.pauses,
            prefix_hit_tokens=scheduler.counters.prefix_hit_tokens,
            request_failures=scheduler.counters.request_failures,
            step_failures=scheduler.counters.step_failures,
        )

    def snapshot(self) -> EngineSnapshot:
        """All that can be measured, from any thread, and without making the engine or the event loop wait."""
        engine, requests = self._parts.engine, self.requests.read()
        running, waiting = engine.scheduler.adapters()
        entries = self._entries.copy().values()
        coming = {"+".join(entry.arrival.request.named_adapters) for entry in entries if not entry.queued}
        named = {account_of(label) for label in requests.adapters.keys() - {OTHER}}
        return EngineSnapshot(
            info=self.info(),
            load=self.load(),
            prefill_tokens=engine.scheduler.counters.prefill_tokens,
            decode_tokens=engine.scheduler.counters.decode_tokens,
            steps=engine.observation.read(),
            requests=requests,
            adapters=self.adapters.stats(),
            residency=self.adapters.residency(self._config.max_named_adapters, named),
            running_adapters=running - {""},
            waiting_adapters=(waiting | coming) - {""},
        )

    def activity(self) -> Activity:
        """What a page that is looked at shows of steps, from any thread, and little enough for each second."""
        engine, requests, steps = self._parts.engine, self.requests, self._parts.engine.observation.read()
        return Activity(
            load=self.load(),
            prefill_tokens=engine.scheduler.counters.prefill_tokens,
            decode_tokens=engine.scheduler.counters.decode_tokens,
            phases={str(phase): counts for phase, counts in steps.phases.items()},
            first_token=requests.first_token.read(),
            inter_token=requests.inter_token.read(),
            adapters=requests.accounts.read(),
        )

    def under_way(self) -> list[RequestActivity]:
        """Every request that has not ended, in no order, from any thread."""
        now_s = time.monotonic()
        coming = [_coming(one, now_s) for one in self._entries.copy().values() if not one.queued]
        return [*coming, *look(self._parts.engine.scheduler, now_s)]

    @property
    def prices(self) -> Prices:
        """By which tenants are charged."""
        return self._parts.engine.scheduler.ledger.prices

    def served(self) -> dict[str, float]:
        """What each tenant with requests was served, per unit of its weight; from any thread."""
        tenants = self._parts.engine.scheduler.ledger.tenants()
        return {tenant: account.served for tenant, account in tenants.items()}

    def begin_drain(self) -> None:
        """Refuse new requests; those that run go on."""
        self._draining = True

    async def wait_idle(self, timeout_s: float | None) -> bool:
        """Wait until no request is left; False if the time ran out first."""
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            return False
        return True

    async def close(self) -> None:
        """End every request with `DrainingError`, then the thread and the adapter loads."""
        self.begin_drain()
        self._closing = True
        await asyncio.to_thread(self._thread.stop)
        for request_id, entry in list(self._entries.items()):
            entry.aborted.set()
            self._fail(request_id, entry, DrainingError())
        self._tokenizing.close()
        self._compiler.close()
        await asyncio.to_thread(self.adapters.close)

    def _make_vocabulary(self) -> Vocabulary:
        base = self._parts.base
        return Vocabulary(
            base.tokenizer,
            eos_token_ids=base.eos_token_ids,
            vocab_size=self._parts.info.vocab_size,
            num_threads=self._config.num_threads or len(os.sched_getaffinity(0)),
        )

    def _examine_soon(self, case: GoldenCase, lease: AdapterLease) -> concurrent.futures.Future[GoldenAnswer]:
        """From any thread. See `Examiner`."""
        examining = self._examine(case, lease)
        try:
            return asyncio.run_coroutine_threadsafe(examining, self._loop)
        except RuntimeError as cause:  # the loop has ended
            examining.close()
            self.adapters.release(lease)
            raise DrainingError from cause

    async def _examine(self, case: GoldenCase, lease: AdapterLease) -> GoldenAnswer:
        """A request like any other, but for a lease that is there already, and that no client's request makes it wait.

        Requests that were taken on may wait for its outcome, so it is not refused while the server drains.
        """
        request = GenerationRequest(
            request_id=f"golden-{secrets.token_hex(8)}",
            prompt=Prompt(token_ids=case.prompt_token_ids),
            adapter=numbered(lease.name, lease.version),
            sampling=SamplingParams(temperature=0.0),
            stopping=StoppingParams(max_tokens=len(case.expected_token_ids)),
            response=ResponseParams(logprobs=True, top_logprobs=NUM_RIVALS),
        )
        queued = False
        try:
            entry = self._enter(request, self._trials)
            try:
                sequence = await self._prepare(entry, lease)
                self._check_still_wanted(request.request_id, entry)
                self._queue(entry, sequence)
                queued = True
            finally:
                if not queued:
                    self._leave(request.request_id)
        finally:
            if not queued:
                self.adapters.release(lease)
        whole = merge_deltas([delta async for delta in entry.stream])
        return GoldenAnswer(
            token_ids=whole.token_ids,
            rivals=tuple(logprob.top for logprob in whole.logprobs),
            tie=TIE if self.info().dtype == "float32" else TIE_OF_16_BITS,
        )

    def _enter(self, request: GenerationRequest, observed: RequestObservation) -> _Entry:
        if self.dead.is_set():
            raise EngineDeadError
        if self._closing:
            raise DrainingError
        if request.request_id in self._entries:
            raise InvalidRequestError("request_id", request.request_id, "a request of that id is already running")
        is_trial = observed is self._trials
        arrival = self._entrance.arrive_for_trial(request) if is_trial else self._entrance.arrive(request)
        entry = _Entry(
            arrival=arrival,
            stream=RequestStream(request.request_id, self.abort, self._hold),
            observed=observed,
            meter=observed.meter(arrival.arrived_s, Owner(request.request_id, request.trace_id)),
            timeline=Timeline.begin(request, arrival.tenant, arrival.arrived_s),
            aborted=asyncio.Event(),
        )
        if not is_trial:
            self.timelines.keep(entry.timeline)
        self._entries[request.request_id] = entry
        self._idle.clear()
        return entry

    def _leave(self, request_id: str) -> None:
        entry = self._entries.pop(request_id, None)
        if entry is None:
            return
        self._entrance.leave(entry.arrival)
        self.timelines.end(request_id)
        if not self._entries:
            self._idle.set()

    async def _prepare(self, entry: _Entry, lease: AdapterLease | None = None) -> Sequence:
        """`lease`: if there is one already, and then it is a trial's."""
        arrival, base, is_trial = entry.arrival, self._parts.base, lease is not None
        request, info = arrival.request, self._parts.info
        # How many tokens its adapter has is known once that is there.
        may_have_added = self._config.max_added_tokens if request.named_adapters else 0
        tokens = await self._tokenizing.encode(
            request.prompt, shorter_than=info.max_model_len, added_tokens=may_have_added
        )
        compiled = None
        if (wanted := request.structured_output) is not None:
            entry.timeline.reach(Stage.GRAMMAR, time.monotonic())
            compiled = await self._compiler.compile(wanted)
        added = may_have_added if may_have_added and has_added(request, info.vocab_size) else 0
        rules = rules_of(request, tokens, base, info, compiled, added_tokens=added)
        entry.max_tokens, entry.num_prompt = rules.max_tokens, len(tokens)
        if lease is None:
            self._entrance.count_prompt(arrival, len(tokens))
        else:
            self._entrance.count_trial(arrival, len(tokens))
        if lease is None:
            lease = await self._acquire(entry)
        if lease.added_tokens != added or lease.own_tokens:
            try:
                tokens, rules = await self._as_adapter_has_it(request, tokens, compiled, lease)
                entry.max_tokens, entry.num_prompt = rules.max_tokens, len(tokens)
            except BaseException:
                if not is_trial:
                    self.adapters.release(lease)
                raise
        # From here on nothing may fail: the lease has to reach the scheduler, which releases it.
        # Where text can end a request the engine has to know it; else it is made when the client is ready to read it.
        stops_at_text = bool(request.stopping.stop)
        if not stops_at_text:
            entry.stream.detokenizer = rules.detokenizer
        adapted_from = first_adapted(lease.invocation, tokens)
        if adapted_from == NEVER:
            logger.debug("%s: answered by the base model, as %r is not invoked", request.request_id, lease.name)
        return Sequence(
            request_id=request.request_id,
            adapter_name=lease.name,
            tokens=tokens,
            num_prompt=len(tokens),
            max_tokens=rules.max_tokens,
            stopping=request.stopping,
            eos_token_ids=base.eos_token_ids,
            lease=lease,
            sampler=rules.sampler,
            detokenizer=rules.detokenizer if stops_at_text else None,
            arrival_s=arrival.arrived_s,
            seed=rules.seed,
            deadline_s=arrival.deadline_s,
            tenant=arrival.tenant,
            weight=request.weight,
            priority=request.priority,
            prefix_scope=request.base_prefix_scope if adapted_from else request.prefix_scope,
            adapted_from=adapted_from,
            loaded_bytes=entry.loaded_bytes,
            echo_prompt_token_ids=request.response.echo_prompt_token_ids,
            timeline=entry.timeline,
        )

    async def _as_adapter_has_it(
        self, request: GenerationRequest, tokens: list[int], compiled: Compiled | None, lease: AdapterLease
    ) -> tuple[list[int], Rules]:
        """The prompt's tokens and the request's rules, where its adapter has other tokens than the base model."""
        base, info, prompt, tokenizer = self._parts.base, self._parts.info, request.prompt, None
        if lease.own_tokens:
            try:
                tokenizer, prompts = await asyncio.to_thread(self._own_tokenizers.find, lease.own_tokens)
            except ValueError as cause:
                raise rejected(lease.name, [str(cause)]) from cause
            if prompt.token_ids is None:
                tokens = await self._tokenizing.encode(prompt, shorter_than=info.max_model_len, prompts=prompts)
        if prompt.token_ids is not None:
            check_ids("token_ids", tokens, info.vocab_size + lease.added_tokens, "adapter")
        added = lease.added_tokens
        return tokens, rules_of(request, tokens, base, info, compiled, added_tokens=added, tokenizer=tokenizer)

    async def _acquire(self, entry: _Entry) -> AdapterLease:
        """Wait for the adapter, the deadline or an abort, whichever comes first; never lose a lease."""
        request = entry.arrival.request
        key, tenant, weight = request.canary_key or request.request_id, request.tenant, request.weight
        timeline = entry.timeline
        timeline.reach(Stage.ADAPTER, time.monotonic())
        if request.adapters:
            future = self.adapters.acquire_mix(
                request.adapters, key, tenant=tenant, weight=weight, wait=timeline.adapter
            )
        else:
            future = self.adapters.acquire(request.adapter, key, tenant=tenant, weight=weight, wait=timeline.adapter)
        was_there = future.done()
        waiter = asyncio.ensure_future(_settled(future))
        aborted = asyncio.ensure_future(entry.aborted.wait())
        asked_s = time.monotonic()
        timeout_s = max(0.0, entry.arrival.deadline_s - asked_s)
        kept = False
        try:
            await asyncio.wait(
                {waiter, aborted},
                timeout=None if math.isinf(timeout_s) else timeout_s,
                return_when=asyncio.FIRST_COMPLETED,
            )
            self._check_still_wanted(request.request_id, entry)
            if not future.done():
                raise DeadlineExceededError(request.request_id)
            lease = future.result()
            kept = True
            entry.loaded_bytes = 0 if was_there else lease.num_bytes
            entry.stream.served_by = timeline.served_by = lease.label
            if request.named_adapters:
                self.requests.adapter_wait.observe(time.monotonic() - asked_s)
        finally:
            waiter.cancel()
            aborted.cancel()
            if not kept:
                self.adapters.abandon(future)
        return lease

    def _check_still_wanted(self, request_id: str, entry: _Entry) -> None:
        if self.dead.is_set():
            raise EngineDeadError
        if entry.aborted.is_set():
            raise DrainingError if self._draining else RequestCancelledError(request_id)

    def _deliver(self, outputs: list[StepOutput]) -> None:
        now_s = time.monotonic()
        for output in outputs:
            entry = self._entries.get(output.request_id)
            if entry is None:
                continue  # closed
            try:
                outcome = self._deliver_one(entry, output, now_s)
            except Exception as cause:
                outcome = self._give_up(entry, output, cause)
            if outcome is not None:
                finished = output.delta.finished if output.delta is not None else None
                self._entrance.learn(entry.arrival, finished, max_tokens=entry.max_tokens, now_s=now_s)
                entry.observed.end(entry.given_up or outcome)
                entry.timeline.end(entry.given_up or outcome, now_s)
                self._leave(output.request_id)
                self._note_numbers(entry.stream.served_by, output)

    def _note_numbers(self, served_by: str, last: StepOutput) -> None:
        """Whether the adapter gave numbers in a request. Of one that always did there is nothing to tell."""
        finished = last.delta.finished if last.delta is not None else None
        if served_by and isinstance(last.error, NumericalError):
            self._unsound.add(served_by)
            self.adapters.note_answer(served_by, last.error.problem)
        elif finished and finished.reason.is_whole and served_by in self._unsound:
            self._unsound.remove(served_by)
            self.adapters.note_answer(served_by)

    def _deliver_one(self, entry: _Entry, output: StepOutput, now_s: float) -> str | None:
        """The outcome, if this is the request's end."""
        if output.error is not None:
            entry.stream.fail(output.error)
            return outcome_of(output.error)
        assert output.delta is not None
        entry.stream.put(output.delta)
        if output.delta.started is not None:
            ratio = self._entrance.note_first_token(entry.arrival, now_s)
            if ratio is not None:
                entry.observed.forecast.observe(ratio)
        entry.meter.deliver(output.delta, now_s)
        entry.timeline.deliver(output.delta, now_s)
        return output.delta.finished.reason.value if output.delta.finished else None

    def _give_up(self, entry: _Entry, output: StepOutput, cause: Exception) -> str | None:
        """Our code failed on one request's output: its client hears of it, and the others have theirs."""
        error = request_failed(output.request_id, cause)
        entry.stream.fail(error)
        entry.given_up = outcome_of(error)
        if output.error is not None or (output.delta is not None and output.delta.finished is not None):
            return entry.given_up
        self.abort(output.request_id)  # its end, and the id's, is what the engine then says
        return None

    def _die(self) -> None:
        self.dead.set()
        for request_id, entry in list(self._entries.items()):
            entry.aborted.set()
            self._fail(request_id, entry, EngineDeadError())

    def _fail(self, request_id: str, entry: _Entry, error: GraloraError) -> None:
        """From outside of the scheduler. A request that is not queued yet ends in `submit`."""
        entry.stream.fail(error)
        if entry.queued:
            entry.observed.end(outcome_of(error))
            entry.timeline.end(outcome_of(error), time.monotonic())
            self._leave(request_id)

    def _call_soon(self, callback: object, *args: object) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(callback, *args)  # type: ignore[arg-type]


def _coming(entry: _Entry, now_s: float) -> RequestActivity:
    """Of one that the scheduler does not have yet."""
    arrival = entry.arrival
    return RequestActivity(
        request_id=arrival.request.request_id,
        tenant=arrival.tenant,
        adapter="+".join(arrival.request.named_adapters),
        version=0,
        stage=entry.timeline.marks[-1].stage,
        age_s=now_s - arrival.arrived_s,
        prompt_tokens=entry.num_prompt,
        computed_tokens=0,
        output_tokens=0,
        max_tokens=entry.max_tokens if entry.num_prompt else 0,
        preemptions=0,
    )


async def _settled(future: concurrent.futures.Future[AdapterLease]) -> None:
    """Return when a thread's future is done in any way, without cancelling it when the wait is cancelled."""
    loop, done = asyncio.get_running_loop(), asyncio.Event()
    future.add_done_callback(lambda _: loop.call_soon_threadsafe(done.set))
    await done.wait()
