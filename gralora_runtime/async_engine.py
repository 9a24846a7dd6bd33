"""The engine as servers use it: asyncio on the outside, one stepping thread inside. Knows no transport.

All state here belongs to the event loop's thread. The engine's thread reaches it only through
`call_soon_threadsafe`, once per step.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import math
import secrets
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass

from gralora_runtime.adapters.catalogue.names import numbered
from gralora_runtime.adapters.checkpoint.golden import GoldenAnswer, GoldenCase
from gralora_runtime.adapters.manager import AdapterManager
from gralora_runtime.adapters.residency.lease import AdapterLease
from gralora_runtime.assemble import EngineParts, assemble
from gralora_runtime.config import EngineConfig
from gralora_runtime.detokenizer import Detokenizer
from gralora_runtime.errors import (
    DeadlineExceededError,
    DrainingError,
    EngineDeadError,
    GraloraError,
    InvalidRequestError,
    NumericalError,
    QueueFullError,
    RequestCancelledError,
    TooLateError,
)
from gralora_runtime.failure import request_failed
from gralora_runtime.info import EngineInfo, EngineLoad, TokenizeResult
from gralora_runtime.intake.backlog import Backlog, Place
from gralora_runtime.intake.forecast import Estimate, Forecast
from gralora_runtime.intake.tokenizing import Tokenizing
from gralora_runtime.observation.requests import RequestMeter, RequestObservation, outcome_of
from gralora_runtime.observation.snapshot import EngineSnapshot
from gralora_runtime.observation.usage import OTHER
from gralora_runtime.request import (
    FinishReason,
    GenerationRequest,
    Prompt,
    ResponseParams,
    SamplingParams,
    StoppingParams,
)
from gralora_runtime.sampling.state import SamplerState
from gralora_runtime.scheduling.fairness import Prices
from gralora_runtime.scheduling.scheduler import StepOutput
from gralora_runtime.scheduling.sequence import Sequence
from gralora_runtime.stepping.engine_thread import EngineThread
from gralora_runtime.stream import RequestStream, merge_deltas

# How far behind the likeliest token one may be, by its log probability, and have been chosen where sums are rounded
# otherwise: logits agree to 1e-3 in float32; 16 bits leave logits of 16 to 32 an eighth between two values.
TIE = 2e-3
TIE_OF_16_BITS = 0.125
NUM_RIVALS = 5

TIMES_THE_CACHE = 16  # tokens of prompts that may wait, over those that the KV cache holds


@dataclass(slots=True, eq=False)
class _Entry:
    """A request from submission to its last delta."""

    stream: RequestStream
    adapter: str
    submitted_s: float
    observed: RequestObservation
    meter: RequestMeter
    aborted: asyncio.Event  # wakes a submission that still waits for its adapter
    place: Place
    deadline_s: float
    estimate: Estimate | None = None
    max_tokens: int = 1
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
        self._trials = RequestObservation(0)  # golden prompts are nobody's requests
        self.first_token_s = config.first_token_s  # the objective, which may change at any time
        self._backlog = Backlog(
            max_requests=config.max_num_seqs + config.max_queue,
            max_tokens=config.max_queue_tokens or TIMES_THE_CACHE * parts.info.num_pages * parts.info.page_size,
        )
        self._forecast = Forecast(
            self._backlog,
            parts.engine.times,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
        )
        self._tokenizing = Tokenizing(parts.prompts)
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
    async def start(cls, config: EngineConfig) -> AsyncEngine:
        """Load the model off the loop and start stepping. Raises `ConfigError` or `ModelUnsupportedError`."""
        parts = await asyncio.to_thread(assemble, config)
        return cls(parts, config)

    async def submit(self, request: GenerationRequest) -> RequestStream:
        """Admit a request: tokenized, checked, and its adapter resident. Raises a `GraloraError` if it cannot be."""
        self.requests.receive()
        try:
            return await self._submit(request)
        except BaseException as error:
            self.requests.end(outcome_of(error))
            raise

    async def _submit(self, request: GenerationRequest) -> RequestStream:
        self._refuse_when_full(request)
        entry = self._enter(request, self.requests)
        try:
            self._refuse_when_late(request, entry, num_prompt=1)
            sequence = await self._prepare(request, entry)
        except BaseException:
            self._leave(request.request_id)
            raise
        self._queue(request, entry, sequence)
        return entry.stream

    def _queue(self, request: GenerationRequest, entry: _Entry, sequence: Sequence) -> None:
        entry.meter.admit(entry.stream.served_by, sequence.num_prompt)
        entry.queued = True
        self._thread.post(request.request_id, lambda scheduler: scheduler.add(sequence))

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
        coming = {entry.adapter for entry in self._entries.copy().values() if not entry.queued}
        named = {label.rpartition("@")[0] for label in requests.adapters.keys() - {OTHER}}
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
        await asyncio.to_thread(self.adapters.close)

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
                sequence = await self._prepare(request, entry, lease)
                self._check_still_wanted(request.request_id, entry)
                self._queue(request, entry, sequence)
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

    def _refuse_when_full(self, request: GenerationRequest) -> None:
        if self.dead.is_set():
            raise EngineDeadError
        if self._draining:
            raise DrainingError
        line = self._backlog.line(tenant_of(request), request.weight)
        problem = self._backlog.full_of_requests(request, line)
        if problem is not None:
            raise QueueFullError(problem, self._forecast.retry_s(line, 0.0, time.monotonic()))

    def _refuse_when_late(self, request: GenerationRequest, entry: _Entry, num_prompt: int) -> None:
        """Raises TooLateError if its deadline or the objective cannot be met, as far as can be told."""
        now_s = time.monotonic()
        estimate = self._forecast.estimate(entry.place, request.stopping, num_prompt=num_prompt, now_s=now_s)
        entry.estimate = estimate
        if estimate is None:
            return
        left_s = entry.deadline_s - now_s
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
                    retry_after_s=self._forecast.retry_s(entry.place.line, expected_s - limit_s, now_s),
                )

    def _enter(self, request: GenerationRequest, observed: RequestObservation) -> _Entry:
        if self.dead.is_set():
            raise EngineDeadError
        if self._closing:
            raise DrainingError
        if request.request_id in self._entries:
            raise InvalidRequestError("request_id", request.request_id, "a request of that id is already running")
        now_s = time.monotonic()
        entry = _Entry(
            stream=RequestStream(request.request_id, self.abort, self._hold),
            adapter=request.adapter,
            submitted_s=now_s,
            observed=observed,
            meter=observed.meter(now_s),
            aborted=asyncio.Event(),
            deadline_s=math.inf if request.timeout_s is None else now_s + request.timeout_s,
            place=self._backlog.enter(tenant_of(request), request.weight),
        )
        self._entries[request.request_id] = entry
        self._idle.clear()
        return entry

    def _leave(self, request_id: str) -> None:
        entry = self._entries.pop(request_id, None)
        if entry is None:
            return
        self._backlog.leave(entry.place)
        if not self._entries:
            self._idle.set()

    async def _prepare(self, request: GenerationRequest, entry: _Entry, lease: AdapterLease | None = None) -> Sequence:
        """`lease`: if there is one already."""
        deadline_s = None if request.timeout_s is None else entry.submitted_s + request.timeout_s
        tokens = await self._tokenizing.encode(request.prompt, shorter_than=self._parts.info.max_model_len)
        max_tokens = entry.max_tokens = self._max_tokens(request, len(tokens))
        self._check_token_ids(request)
        self._count_prompt(request, entry, len(tokens), is_trial=lease is not None)
        base, eos_token_ids = self._parts.base, self._parts.base.eos_token_ids
        seed = secrets.randbits(63) if request.sampling.seed is None else request.sampling.seed
        sampler = SamplerState(
            request.sampling,
            request.stopping,
            request.response,
            seed=seed,
            prompt_token_ids=tokens,
            eos_token_ids=eos_token_ids,
            vocab_size=self._parts.info.vocab_size,
        )
        detokenizer = Detokenizer(
            base.tokenizer,
            request.stopping.stop,
            prompt_token_ids=tokens,
            min_tokens=request.stopping.min_tokens,
        )
        # Where text can end a request the engine has to know it; else it is made when the client is ready to read it.
        stops_at_text = bool(request.stopping.stop)
        if not stops_at_text:
            entry.stream.detokenizer = detokenizer
        # Last, because from here on nothing may fail: the lease has to reach the scheduler, which releases it.
        if lease is None:
            lease = await self._acquire(request, entry, deadline_s)
        return Sequence(
            request_id=request.request_id,
            adapter_name=lease.name,
            tokens=tokens,
            num_prompt=len(tokens),
            max_tokens=max_tokens,
            stopping=request.stopping,
            eos_token_ids=eos_token_ids,
            lease=lease,
            sampler=sampler,
            detokenizer=detokenizer if stops_at_text else None,
            arrival_s=entry.submitted_s,
            seed=seed,
            deadline_s=deadline_s,
            tenant=entry.place.line.tenant,
            weight=request.weight,
            priority=request.priority,
            prefix_scope=request.prefix_scope,
            loaded_bytes=entry.loaded_bytes,
            echo_prompt_token_ids=request.response.echo_prompt_token_ids,
        )

    def _count_prompt(self, request: GenerationRequest, entry: _Entry, num_prompt: int, *, is_trial: bool) -> None:
        """A trial is not refused: others wait for its outcome."""
        place = entry.place
        problem = None if is_trial else self._backlog.full_of_tokens(request, place, num_prompt)
        if problem is not None:
            raise QueueFullError(problem, self._forecast.retry_s(place.line, 0.0, time.monotonic()))
        self._backlog.count(place, num_prompt)
        if not is_trial:
            self._refuse_when_late(request, entry, num_prompt)
        self._forecast.take_on(num_prompt, time.monotonic())

    def _max_tokens(self, request: GenerationRequest, num_prompt: int) -> int:
        limit = self._parts.info.max_model_len
        if num_prompt >= limit:
            raise InvalidRequestError("prompt", num_prompt, f"the prompt must be shorter than {limit} tokens")
        room, wanted = limit - num_prompt, request.stopping.max_tokens
        if wanted is not None and wanted > room:
            problem = f"the prompt's {num_prompt} tokens leave room for {room} of at most {limit}"
            raise InvalidRequestError("stopping.max_tokens", wanted, problem)
        return room if wanted is None else wanted

    def _check_token_ids(self, request: GenerationRequest) -> None:
        vocab_size = self._parts.info.vocab_size
        fields = {
            "stopping.stop_token_ids": request.stopping.stop_token_ids,
            "sampling.logit_bias": request.sampling.logit_bias,
        }
        for field, ids in fields.items():
            for token in ids:
                if not 0 <= token < vocab_size:
                    raise InvalidRequestError(field, token, f"token ids of this model are 0 to {vocab_size - 1}")

    async def _acquire(self, request: GenerationRequest, entry: _Entry, deadline_s: float | None) -> AdapterLease:
        """Wait for the adapter, the deadline or an abort, whichever comes first; never lose a lease."""
        future = self.adapters.acquire(request.adapter, request.canary_key or request.request_id)
        was_there = future.done()
        waiter = asyncio.ensure_future(_settled(future))
        aborted = asyncio.ensure_future(entry.aborted.wait())
        asked_s = time.monotonic()
        timeout_s = None if deadline_s is None else max(0.0, deadline_s - asked_s)
        kept = False
        try:
            await asyncio.wait({waiter, aborted}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            self._check_still_wanted(request.request_id, entry)
            if not future.done():
                raise DeadlineExceededError(request.request_id)
            lease = future.result()
            kept = True
            entry.loaded_bytes = 0 if was_there else lease.num_bytes
            entry.stream.served_by = numbered(lease.name, lease.version) if lease.version else lease.name
            if request.adapter:
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
                self._learn(entry, output, now_s)
                entry.observed.end(entry.given_up or outcome)
                self._leave(output.request_id)
                self._note_numbers(entry.stream.served_by, output)

    def _note_numbers(self, served_by: str, last: StepOutput) -> None:
        """Whether the adapter gave numbers in a request. Of one that always did there is nothing to tell."""
        finished = last.delta.finished if last.delta is not None else None
        if served_by and isinstance(last.error, NumericalError):
            self._unsound.add(served_by)
            self.adapters.note_answer(served_by, last.error.problem)
        elif finished and finished.reason in (FinishReason.STOP, FinishReason.LENGTH) and served_by in self._unsound:
            self._unsound.remove(served_by)
            self.adapters.note_answer(served_by)

    def _note_first_token(self, entry: _Entry, now_s: float) -> None:
        self._backlog.start(entry.place)
        if entry.estimate is not None:
            took_s = now_s - entry.submitted_s
            entry.observed.forecast.observe(took_s / max(entry.estimate.first_token_s, 1e-3))

    def _learn(self, entry: _Entry, output: StepOutput, now_s: float) -> None:
        """From an answer, how long the next ones will be; and how right the forecast was."""
        finished = output.delta.finished if output.delta is not None else None
        ended = finished is not None and finished.reason in {FinishReason.STOP, FinishReason.LENGTH}
        if entry.estimate is not None and (ended or now_s >= entry.deadline_s):
            self._forecast.compare(entry.estimate, now_s - entry.submitted_s, ended=ended)
        if finished is not None and finished.reason is not FinishReason.CANCELLED:
            self._forecast.learn(
                entry.place.line.tenant,
                num_output=finished.output_tokens,
                max_tokens=entry.max_tokens,
                whole=finished.reason is not FinishReason.DEADLINE,
            )

    def _deliver_one(self, entry: _Entry, output: StepOutput, now_s: float) -> str | None:
        """The outcome, if this is the request's end."""
        if output.error is not None:
            entry.stream.fail(output.error)
            return outcome_of(output.error)
        assert output.delta is not None
        entry.stream.put(output.delta)
        if output.delta.started is not None:
            self._note_first_token(entry, now_s)
        entry.meter.deliver(output.delta, now_s)
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
            self._leave(request_id)

    def _call_soon(self, callback: object, *args: object) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(callback, *args)  # type: ignore[arg-type]


async def _settled(future: concurrent.futures.Future[AdapterLease]) -> None:
    """Return when a thread's future is done in any way, without cancelling it when the wait is cancelled."""
    loop, done = asyncio.get_running_loop(), asyncio.Event()
    future.add_done_callback(lambda _: loop.call_soon_threadsafe(done.set))
    await done.wait()


def tenant_of(request: GenerationRequest) -> str:
    """Whose share it is served from. An adapter that is nobody's is a tenant of its own, all its versions together."""
    return request.tenant or f"adapter:{request.adapter.partition('@')[0]}"
