"""A bug in the step ends the requests that it concerns and nobody else: exceptions thrown at random places of it."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.fakes import FakeDetokenizer, fake_lease

from gralora_runtime.detokenizer import TextDelta
from gralora_runtime.errors import MemoryShortageError, RequestFailedError, StepFailedError
from gralora_runtime.observation.steps import StepObservation
from gralora_runtime.plan import StepPlan
from gralora_runtime.request import FinishReason, ResponseParams, SamplingParams, StoppingParams
from gralora_runtime.sampling import host
from gralora_runtime.sampling.state import SamplerState
from gralora_runtime.scheduling.pages import PagePool
from gralora_runtime.scheduling.scheduler import Scheduler, StepOutput
from gralora_runtime.scheduling.sequence import Sequence
from gralora_runtime.stepping import executor as executor_module
from gralora_runtime.stepping.batch import BatchBuilder, StepTensors
from gralora_runtime.stepping.engine import Engine
from gralora_runtime.stepping.engine_thread import EngineThread
from gralora_runtime.stepping.executor import InTurn
from gralora_runtime.stepping.fence import StepFence

WAIT_S = 3
VOCAB, NUM_PAGES, PAGE_SIZE, MAX_TOKENS = 64, 12, 4, 12
ROWS = np.random.default_rng(0).normal(size=(257, VOCAB)).astype(np.float32) * 2
PLACES = np.random.default_rng(1).integers(1, 2**31, size=NUM_PAGES * PAGE_SIZE)

# Where an exception can be thrown, by whom it concerns.
OF_THE_STEP = ("plan", "freeze", "build", "forward", "sample")
OF_A_ROW = ("takes_argmax", "choose", "observe", "push", "flush", "publish", "finish")
OF_ADMISSION = ("match", "allocate")


class Panic(BaseException):
    """As the panic of a library written in Rust arrives: it is no `Exception`."""


@dataclass(frozen=True)
class Fault:
    """At the `nth` call of `place` from the start, before or after what is really done there."""

    place: str
    nth: int
    after: bool
    kind: type[BaseException]


@dataclass
class Faults:
    """Throws what is due, and remembers who was concerned."""

    due: tuple[Fault, ...]
    calls: Counter[str] = field(default_factory=Counter)
    thrown: list[Fault] = field(default_factory=list)

    @contextmanager
    def at(self, place: str) -> Iterator[None]:
        number = self.calls[place]
        self.calls[place] += 1
        hit = [fault for fault in self.due if (fault.place, fault.nth) == (place, number)]
        for fault in hit:
            if not fault.after:
                self._throw(fault)
        yield
        for fault in hit:
            self._throw(fault)

    def around(self, place: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with self.at(place):
                return work(*args, **kwargs)

        return wrapped

    def _throw(self, fault: Fault) -> None:
        self.thrown.append(fault)
        raise fault.kind(f"thrown at {fault}")


class FaultySampler(SamplerState):
    faults = Faults(())

    def observe(self, token_id: int) -> None:
        with self.faults.at("observe"):
            super().observe(token_id)

    def choose(self, logits: Any) -> Any:
        with self.faults.at("choose"):
            return super().choose(logits)

    @property
    def takes_argmax(self) -> bool:
        with self.faults.at("takes_argmax"):
            return super().takes_argmax


class FaultyDetokenizer(FakeDetokenizer):
    faults = Faults(())

    def push(self, token_id: int) -> TextDelta:
        with self.faults.at("push"):
            return super().push(token_id)

    def flush(self) -> str:
        with self.faults.at("flush"):
            return "."


class FaultySequence(Sequence):
    faults = Faults(())
    __slots__ = ()

    def finish(self, reason: FinishReason, **stop: Any) -> Any:
        with self.faults.at("finish"):
            return super().finish(reason, **stop)


class Model:
    """Logits are a function of all that the pages of a row say it has read, so a page in wrong hands changes tokens."""

    def __init__(self, faults: Faults, each_step: Callable[[], None]) -> None:
        self._faults, self._each_step = faults, each_step
        self._memory = np.zeros(NUM_PAGES * PAGE_SIZE, dtype=np.int64)

    def execute(self, tensors: StepTensors) -> torch.Tensor:
        self._each_step()
        with self._faults.at("forward"):
            slots = tensors.kv_slots.numpy()
            self._memory[slots] = tensors.input_ids[0].numpy() * 1000 + tensors.position_ids[0].numpy()
            starts, lens = tensors.query_starts.numpy(), tensors.context_lens.numpy()
            rows = np.searchsorted(starts, tensors.logits_index.numpy(), side="right") - 1
            logits = [self._row(tensors, row, lens[row]) for row in rows]
            return torch.from_numpy(np.array(logits, dtype=np.float32).reshape(-1, VOCAB))

    def _row(self, tensors: StepTensors, row: int, length: int) -> np.ndarray:
        positions = np.arange(length)
        pages = tensors.page_table[row].numpy()[positions // PAGE_SIZE]
        read = self._memory[pages * PAGE_SIZE + positions % PAGE_SIZE]
        return ROWS[int((read * PLACES[:length]).sum() % 257)]


@dataclass(frozen=True)
class Wanted:
    """One request. `arrival`: the forward pass at which it comes."""

    number: int
    arrival: int = 0

    @property
    def request_id(self) -> str:
        return f"r{self.number}"

    def sequence(self, faults: Faults) -> FaultySequence:
        rng = np.random.default_rng(self.number % 4)  # some share a prefix
        prompt = [*rng.integers(0, VOCAB, size=6).tolist(), *range(self.number % 5)]
        stopping = StoppingParams(max_tokens=3 + self.number % 7, ignore_eos=self.number % 3 > 0)
        sampling = [
            SamplingParams(temperature=0.0),
            SamplingParams(temperature=1.0),
            SamplingParams(temperature=0.7, top_k=9, repetition_penalty=1.3),
        ][self.number % 3]
        sampler = FaultySampler(
            sampling, stopping, ResponseParams(logprobs=self.number % 2 == 1),
            seed=self.number, prompt_token_ids=prompt, eos_token_ids=(3,), vocab_size=VOCAB,
        )  # fmt: skip
        sequence = FaultySequence(
            request_id=self.request_id,
            adapter_name="",
            tokens=prompt,
            num_prompt=len(prompt),
            max_tokens=stopping.max_tokens or 1,
            stopping=stopping,
            eos_token_ids=(3,),
            lease=fake_lease(self.request_id),
            sampler=sampler,
            detokenizer=FaultyDetokenizer(),  # type: ignore[arg-type]
            arrival_s=0.0,
            seed=self.number,
        )
        FaultySampler.faults = FaultyDetokenizer.faults = FaultySequence.faults = faults
        return sequence


class Run:
    """The engine on its thread over a fake model, until all that was asked for has ended."""

    def __init__(self, wanted: tuple[Wanted, ...], due: tuple[Fault, ...] = (), *, pipelined: bool = False) -> None:
        self.faults = faults = Faults(due)
        self.wanted = wanted
        self.outputs: dict[str, list[StepOutput]] = {}
        self.released: Counter[str] = Counter()
        self.plans_that_failed: list[StepPlan | None] = []
        self.failed_for_nobody: list[StepPlan | None] = []  # launched before the end of all its requests was known
        self.died = False
        self._coming = sorted(wanted, key=lambda request: request.arrival)
        self._steps = self._coming[0].arrival  # the first one comes at once
        pool = PagePool(NUM_PAGES, PAGE_SIZE)
        self.scheduler = scheduler = Scheduler(
            pool, max_num_seqs=4, max_num_batched_tokens=MAX_TOKENS,
            release_lease=lambda lease: self.released.update([lease.name]), now_s=lambda: 0.0,
        )  # fmt: skip
        batch = BatchBuilder(max_num_tokens=MAX_TOKENS, page_size=PAGE_SIZE, slot_generation=lambda _: 1)
        observation = StepObservation()
        executor = InTurn(Model(faults, self._arrivals), observation)
        self.engine = Engine(scheduler, batch, executor, observation, StepFence(), pipelined=pipelined)
        for owner, name, place in [
            (scheduler, "plan", "plan"),
            (scheduler, "_freeze", "freeze"),
            (batch, "build", "build"),
            (pool, "match", "match"),
            (pool, "allocate", "allocate"),
            (pool, "publish", "publish"),
        ]:
            setattr(owner, name, faults.around(place, getattr(owner, name)))
        executor_module.sample = faults.around("sample", host.sample)
        fail_step, step = scheduler.fail_step, self.engine.step

        def note_failure(plan: StepPlan | None, cause: BaseException) -> bool:
            concerned = fail_step(plan, cause)
            (self.plans_that_failed if concerned else self.failed_for_nobody).append(plan)
            return concerned

        def checked_step(before_forward: Callable[[], None]) -> list[StepOutput]:
            outputs = step(before_forward)
            scheduler.check_integrity()
            self._arrivals(always=not scheduler.has_work)
            return outputs

        scheduler.fail_step, self.engine.step = note_failure, checked_step  # type: ignore[method-assign]
        self._ended = threading.Event()
        self.thread = EngineThread(
            self.engine, prepare=lambda: None, deliver=faults.around("deliver", self._deliver), on_death=self._on_death
        )

    def run(self) -> Run:
        self._arrivals()
        self.thread.start()
        assert self._ended.wait(WAIT_S), f"not all requests ended: {self.outputs}"
        self.alive, died = self.thread._thread.is_alive(), self.died
        self.thread.stop()
        self.died = died  # a delivery that fails while it is being stopped has nobody to tell any more
        executor_module.sample = host.sample
        return self

    def tokens(self, request_id: str) -> list[int]:
        deltas = [output.delta for output in self.outputs.get(request_id, []) if output.delta]
        return [token for delta in deltas for token in delta.token_ids]

    def text(self, request_id: str) -> str:
        return "".join(output.delta.text for output in self.outputs.get(request_id, []) if output.delta)

    def end(self, request_id: str) -> object:
        """How it ended: a reason or an error. What comes after the end is not heard any more."""
        for output in self.outputs.get(request_id, []):
            if output.error is not None:
                return output.error
            if output.delta is not None and output.delta.finished is not None:
                return output.delta.finished.reason
        return None

    def _arrivals(self, *, always: bool = False) -> None:
        """Posts who is due; called on the engine's thread, in the same steps each time."""
        self._steps += 1
        while self._coming and (always or self._coming[0].arrival < self._steps):
            request = self._coming.pop(0)
            self.thread.post(request.request_id, lambda s, r=request: s.add(r.sequence(self.faults)))  # type: ignore[misc]

    def _deliver(self, outputs: list[StepOutput]) -> None:
        for output in outputs:
            self.outputs.setdefault(output.request_id, []).append(output)
        if all(self.end(request.request_id) is not None for request in self.wanted):
            self._ended.set()
        self._arrivals(always=not self.scheduler.has_work)

    def _on_death(self) -> None:
        self.died = True
        self._ended.set()


@cache
def undisturbed(number: int) -> tuple[list[int], str, object]:
    request = Wanted(number)
    alone = Run((request,)).run()
    return alone.tokens(request.request_id), alone.text(request.request_id), alone.end(request.request_id)


def faults_at(places: tuple[str, ...], highest: int) -> st.SearchStrategy[Fault]:
    kinds = st.sampled_from([RuntimeError, MemoryError, AssertionError, KeyError, Panic])
    return st.builds(Fault, st.sampled_from(places), st.integers(0, highest), st.booleans(), kinds)


requests = st.lists(
    st.builds(Wanted, st.integers(0, 20), st.integers(0, 12)), min_size=2, max_size=6, unique_by=lambda r: r.number
).map(tuple)
# Fewer shared failures than would end the engine.
schedules = st.tuples(
    st.lists(faults_at(OF_THE_STEP, 25) | faults_at(("deliver",), 15), max_size=2),
    st.lists(faults_at(OF_A_ROW, 40) | faults_at(OF_ADMISSION, 6), max_size=3),
).map(lambda drawn: tuple(drawn[0] + drawn[1]))


@settings(max_examples=2_000, deadline=None, derandomize=True, database=None)
@given(wanted=requests, due=schedules, pipelined=st.booleans())
def test_only_the_rows_concerned_end_and_all_others_have_their_tokens(
    wanted: tuple[Wanted, ...], due: tuple[Fault, ...], pipelined: bool
) -> None:
    run = Run(wanted, due, pipelined=pipelined).run()

    assert not run.died
    assert run.alive
    thrown = Counter(fault.place for fault in run.faults.thrown)
    ends = {request.request_id: run.end(request.request_id) for request in wanted}
    failed = [request_id for request_id, end in ends.items() if isinstance(end, RequestFailedError)]
    in_failed_steps = {row.request_id for plan in run.plans_that_failed if plan for row in plan.rows}
    for request in wanted:
        tokens, text, reason = undisturbed(request.number)
        got, end = run.tokens(request.request_id), ends[request.request_id]
        assert tokens[: len(got)] == got, "a wrong token"
        assert text.startswith(run.text(request.request_id))
        if not isinstance(end, (RequestFailedError, StepFailedError, MemoryShortageError)):
            assert (got, run.text(request.request_id), end) == (tokens, text, reason)
        if isinstance(end, StepFailedError):
            assert request.request_id in in_failed_steps or None in run.plans_that_failed
    num_of_rows = sum(thrown[place] for place in (*OF_A_ROW, *OF_ADMISSION))
    num_of_steps = sum(thrown[place] for place in OF_THE_STEP)
    assert len(failed) <= num_of_rows + thrown["deliver"] * len(wanted)
    counters = run.scheduler.counters
    assert len(run.plans_that_failed) == counters.step_failures
    # Pages are allocated when a sequence is let in, which concerns it alone, and when one grows, in the plan of all.
    num_of_steps -= len(run.failed_for_nobody)
    assert pipelined or not run.failed_for_nobody
    assert num_of_steps <= counters.step_failures <= num_of_steps + thrown["allocate"]
    if not (counters.step_failures or thrown["deliver"]):
        # A row that was launched before its request's end was known concerns nobody.
        assert counters.request_failures == num_of_rows or (pipelined and counters.request_failures < num_of_rows)
    assert run.released == Counter(request.request_id for request in wanted), "each lease is given back once"
    assert run.scheduler.pages.counts().leased == 0


WANTED = tuple(Wanted(number) for number in (3, 4, 5, 6))  # of 6 to 9 tokens each, let in in this order


def shortages(*steps: int) -> tuple[Fault, ...]:
    return tuple(Fault("forward", step, after=False, kind=MemoryError) for step in steps)


def test_the_younger_half_ends_and_the_older_half_has_its_tokens() -> None:
    run = Run(WANTED, shortages(3), pipelined=False).run()
    ends = [run.end(request.request_id) for request in WANTED]

    assert [isinstance(end, MemoryShortageError) for end in ends] == [False, False, True, True]
    assert ends[3].retry_after_s > 0
    for request in WANTED[:2]:
        assert (run.tokens(request.request_id), run.text(request.request_id)) == undisturbed(request.number)[:2]


def test_a_step_that_another_already_follows_ends_whole() -> None:
    """Pipelined, the rows behind it have been computed from what it did not write."""
    run = Run(WANTED, shortages(3), pipelined=True).run()

    assert {type(run.end(request.request_id)) for request in WANTED} == {MemoryShortageError}
    assert not run.died


@pytest.mark.parametrize("pipelined", [False, True], ids=["in-turn", "pipelined"])
def test_memory_that_stays_short_ends_requests_and_never_the_engine(pipelined: bool) -> None:
    run = Run(WANTED, shortages(*range(20)), pipelined=pipelined).run()

    assert {type(run.end(request.request_id)) for request in WANTED} == {MemoryShortageError}
    assert run.alive
    assert not run.died
    assert run.scheduler.pages.counts().leased == 0


def test_what_was_launched_in_vain_is_planned_anew_behind_what_runs() -> None:
    """Where launching itself runs out, as on a GPU, the step before is on its way and is taken in first."""
    run = Run(WANTED, pipelined=True)
    launch, calls = run.engine.executor.launch, []

    def short_of_memory(*args: object) -> object:
        calls.append(args)
        if len(calls) == 4:
            raise MemoryError
        return launch(*args)

    run.engine.executor.launch = short_of_memory
    run.run()
    ends = [run.end(request.request_id) for request in WANTED]

    assert [isinstance(end, MemoryShortageError) for end in ends] == [False, False, True, True]
    for request in WANTED[:2]:
        assert (run.tokens(request.request_id), run.text(request.request_id)) == undisturbed(request.number)[:2]
