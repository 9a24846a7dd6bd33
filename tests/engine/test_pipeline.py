"""Pipelined steps give each request what steps one after the other give it. What a late end costs is one row's work.

| what changes while a sequence's next row is on its way | what becomes of that row                 | test     |
|--------------------------------------------------------|------------------------------------------|----------|
| eos, a stop token, a stop string                       | its token is dropped                     | _stop_   |
| max_tokens                                             | there is none: the end was known         | _length_ |
| cancel, deadline                                       | its token is dropped                     | _cancel_ |
| preemption                                             | its token is kept, its pages are not     | _preempt |
| another adapter wants its slot                         | the slot is cleared behind it            | _slot_   |
| the next request has its id                            | its token is not that request's          | _id_     |
| the next request has its prefix                        | its page is not published                | _prefix_ |
| the step before fails                                  | it ends with that step                   | _fails_  |
| the engine stops                                       | it is dropped, and all is given back     | _stops_  |

Failures anywhere, pipelined or not, are in test_containment.py.
"""

from __future__ import annotations

import math
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.fakes import Clock, FakeDetokenizer
from support.pipelined import PIPELINE

from gralora_runtime.adapters.residency.lease import BASE_LEASE, AdapterLease
from gralora_runtime.detokenizer import StopScanner, TextDelta
from gralora_runtime.errors import GraloraError, StepFailedError
from gralora_runtime.observation.steps import StepObservation
from gralora_runtime.plan import StepPlan
from gralora_runtime.request import FinishReason, ResponseParams, SamplingParams, StoppingParams
from gralora_runtime.sampling.state import SamplerState
from gralora_runtime.scheduling.pages import PagePool
from gralora_runtime.scheduling.scheduler import Scheduler
from gralora_runtime.scheduling.sequence import Sequence
from gralora_runtime.stepping.batch import BatchBuilder, StepTensors
from gralora_runtime.stepping.engine import Engine
from gralora_runtime.stepping.executor import Beside, Executor, InTurn
from gralora_runtime.stepping.fence import StepFence

VOCAB, PAGE_SIZE, MAX_TOKENS, SEATS, EOS = 64, 4, 12, 4, 3
ROWS = np.random.default_rng(0).normal(size=(257, VOCAB)).astype(np.float32) * 2
PLACES = np.random.default_rng(1).integers(1, 2**31, size=1024)


class Slots:
    """Two places for adapters' contents. One is given to another adapter when nobody has a lease on it, and cleared
    before, behind all steps that may still read it."""

    def __init__(self, fence: StepFence) -> None:
        self.contents = np.zeros(2, np.int64)  # 0: cleared
        self.generations = [0, 0]
        self._leases = [0, 0]
        self._fence = fence
        self._serials = 0
        self.released: Counter[int] = Counter()

    def acquire(self, content: int, let_go_on: Callable[[], object]) -> AdapterLease | None:
        """None: both are leased. `let_go_on` is what a thread of the engine would do meanwhile."""
        if content == 0:
            return BASE_LEASE
        slot = next((i for i in (0, 1) if self.contents[i] == content), None)
        if slot is None:
            slot = next((i for i in (0, 1) if not self._leases[i]), None)
            if slot is None:
                return None
            waiting = threading.Thread(target=self._fence.wait)
            waiting.start()
            while waiting.is_alive():
                let_go_on()
                waiting.join(0.0005)
            self.generations[slot] += 1
            self.contents[slot] = content
        self._leases[slot] += 1
        self._serials += 1
        return AdapterLease(f"a{content}", f"d{content}", slot, self.generations[slot], width=8, serial=self._serials)

    def release(self, lease: AdapterLease) -> None:
        if lease.slot >= 0:
            self._leases[lease.slot] -= 1
        self.released[lease.serial] += 1

    @property
    def num_leases(self) -> int:
        return sum(self._leases)


class Model:
    """Logits are a function of all tokens and adapters that the pages of a row say it has read, when it is computed."""

    def __init__(self, slots: Slots, num_pages: int, pause: Callable[[], None] = lambda: None) -> None:
        self._slots = slots
        self._memory = np.zeros(num_pages * PAGE_SIZE, np.int64)
        self._pause = pause
        self.fails = False
        self.steps: list[int] = []  # rows of each

    def execute(self, tensors: StepTensors, newest: torch.Tensor | None = None) -> torch.Tensor:
        assert newest is None
        self._pause()
        if self.fails:
            self.fails = False
            raise RuntimeError("a fault of the device")
        starts, lens = tensors.query_starts.numpy(), tensors.context_lens.numpy()
        self.steps.append(len(lens))
        contents = np.zeros(starts[-1], np.int64)
        grouping = tensors.grouping
        contents[grouping.order] = self._slots.contents[np.repeat(grouping.slots, np.diff(grouping.starts))]
        words = tensors.input_ids[0].numpy() * 1000 + tensors.position_ids[0].numpy() + 1_000_000 * contents
        self._memory[tensors.kv_slots.numpy()] = words
        rows = np.searchsorted(starts, tensors.logits_index.numpy(), side="right") - 1
        logits = [self._row(tensors.page_table[row].numpy(), lens[row]) for row in rows]
        return torch.from_numpy(np.array(logits, dtype=np.float32).reshape(-1, VOCAB))

    def _row(self, pages: np.ndarray, length: int) -> np.ndarray:
        positions = np.arange(length)
        read = self._memory[pages[positions // PAGE_SIZE] * PAGE_SIZE + positions % PAGE_SIZE]
        return ROWS[int((read * PLACES[:length]).sum() % 257)]


class Detokenizer(FakeDetokenizer):
    """Each token is a letter, and so stop strings are near."""

    def __init__(self, stop: tuple[str, ...]) -> None:
        self._stops = StopScanner(stop)

    def push(self, token_id: int) -> TextDelta:
        return self._stops.feed("abcd"[token_id % 4], enabled=True)

    def flush(self) -> str:
        return self._stops.flush()


@dataclass(frozen=True)
class Wanted:
    """One request: all that it is follows from its number."""

    number: int
    arrival: int = 0  # the step at which it comes
    cancel: int | None = None  # steps after it came
    deadline: int | None = None

    def sequence(self, request_id: str, lease: AdapterLease, deadline_s: float) -> Sequence:
        n = self.number
        rng = np.random.default_rng(n % 5)  # some share a prefix
        prompt = [*rng.integers(0, VOCAB, size=5 + n % 6).tolist(), *range(n % 3)]
        stopping = StoppingParams(
            max_tokens=1 + n % 9, min_tokens=n % 3, ignore_eos=n % 4 == 0,
            stop=("ab", "cda") if n % 3 == 0 else (), stop_token_ids=(7, 11) if n % 2 else (),
        )  # fmt: skip
        sampling = [
            SamplingParams(temperature=0.0),
            SamplingParams(temperature=1.0),
            SamplingParams(temperature=0.7, top_k=9, repetition_penalty=1.3, frequency_penalty=0.4),
        ][n % 3]
        return Sequence(
            request_id=request_id, adapter_name=lease.name, tokens=prompt, num_prompt=len(prompt),
            max_tokens=stopping.max_tokens or 1, stopping=stopping, eos_token_ids=(EOS,), lease=lease,
            sampler=SamplerState(
                sampling, stopping, ResponseParams(logprobs=n % 2 == 1), seed=n, prompt_token_ids=prompt,
                eos_token_ids=(EOS,), vocab_size=VOCAB,
            ),
            detokenizer=Detokenizer(stopping.stop), arrival_s=0.0, seed=n, deadline_s=deadline_s,
        )  # fmt: skip

    @property
    def content(self) -> int:
        """Of its adapter: 0 is the base model."""
        return self.number % 4


@dataclass
class Answer:
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[float] = field(default_factory=list)
    end: object = None

    @property
    def reason(self) -> object:
        return getattr(self.end, "reason", type(self.end))


class Engines:
    """One engine, its outputs by request, and checks after each step."""

    def __init__(
        self, *, pipelined: bool, num_pages: int = 40, executor: Callable[[Model, StepObservation], Executor] = InTurn,
        pause: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self.fence, self.clock, observation = StepFence(), Clock(), StepObservation()
        self.slots = Slots(self.fence)
        self.model = Model(self.slots, num_pages, pause)
        self.pool = PagePool(num_pages, PAGE_SIZE)
        self.plans: list[StepPlan] = []
        self.scheduler = Scheduler(
            self.pool, max_num_seqs=SEATS, max_num_batched_tokens=MAX_TOKENS, release_lease=self.slots.release,
            now_s=self.clock,
        )  # fmt: skip
        batch = BatchBuilder(
            max_num_tokens=MAX_TOKENS, page_size=PAGE_SIZE, slot_generation=lambda slot: self.slots.generations[slot]
        )
        self.engine = Engine(
            self.scheduler, batch, executor(self.model, observation), observation, self.fence, pipelined=pipelined
        )
        self.answers: dict[str, Answer] = {}
        self.open: set[str] = set()
        plan = self.scheduler.plan

        def noted() -> StepPlan | None:
            found = plan()
            self.plans += [found] if found else []
            return found

        self.scheduler.plan = noted  # type: ignore[method-assign]

    def add(self, wanted: Wanted, request_id: str = "", deadline_s: float = math.inf) -> bool:
        request_id = request_id or f"r{wanted.number}"
        lease = self.slots.acquire(wanted.content, self.step)
        if lease is None:
            return False
        self.answers[request_id] = Answer()
        self.open.add(request_id)
        self.scheduler.add(wanted.sequence(request_id, lease, deadline_s))
        return True

    def step(self) -> None:
        self.clock.now_s += 1
        for output in self.engine.step():
            assert output.request_id in self.open, "an output behind the end"
            answer = self.answers[output.request_id]
            if output.error is not None:
                answer.end = output.error
            if output.delta is not None:
                answer.tokens += output.delta.token_ids
                answer.text += output.delta.text
                answer.logprobs += [logprob.logprob for logprob in output.delta.logprobs]
                answer.end = output.delta.finished
            if answer.end is not None:
                self.open.discard(output.request_id)
        self.scheduler.check_integrity()

    def run(self) -> None:
        for _ in range(500):
            if not self.engine.has_work:
                break
            self.step()
        assert not self.open, f"never ended: {self.open}"
        assert self.pool.counts().leased == 0
        assert self.slots.num_leases == 0
        assert all(count == 1 for serial, count in self.slots.released.items() if serial), "a lease released twice"

    def close(self) -> None:
        self.engine.close()


def run(schedule: tuple[Wanted, ...], **options: object) -> Engines:
    """All of them, each when it is due and its adapter has a place."""
    engines = Engines(**options)  # type: ignore[arg-type]
    coming, cancels, number = sorted(schedule, key=lambda wanted: wanted.arrival), dict[str, int](), 0
    while coming or engines.engine.has_work:
        while coming and coming[0].arrival <= number:
            wanted = coming[0]
            deadline_s = math.inf if wanted.deadline is None else engines.clock.now_s + wanted.deadline
            if not engines.add(wanted, deadline_s=deadline_s):
                break  # somebody has to end first
            coming.pop(0)
            if wanted.cancel is not None:
                cancels[f"r{wanted.number}"] = number + wanted.cancel
        for request_id in [name for name, due in cancels.items() if due <= number]:
            del cancels[request_id]
            engines.scheduler.cancel(request_id)
        engines.step()
        number += 1
        assert number < 1000, "still working"
    engines.run()
    engines.close()
    return engines


def undisturbed(wanted: Wanted) -> Answer:
    alone = run((Wanted(wanted.number),), pipelined=False)
    return alone.answers[f"r{wanted.number}"]


requests = st.builds(
    Wanted, st.integers(0, 59), st.integers(0, 12), st.none() | st.none() | st.integers(0, 9),
    st.none() | st.none() | st.integers(1, 9),
)  # fmt: skip
schedules = st.lists(requests, min_size=1, max_size=7, unique_by=lambda wanted: wanted.number).map(tuple)


def check(schedule: tuple[Wanted, ...], pipelined: Engines, serial: Engines) -> None:
    for wanted in schedule:
        name = f"r{wanted.number}"
        actual, expected = pipelined.answers[name], serial.answers[name]
        if wanted.cancel is None and wanted.deadline is None:
            assert (actual.tokens, actual.text, actual.logprobs, actual.reason) == (
                expected.tokens, expected.text, expected.logprobs, expected.reason,
            )  # fmt: skip
            assert usage(actual) == usage(expected)
        else:  # these come at a moment, not at a token
            whole = undisturbed(wanted)
            assert whole.tokens[: len(actual.tokens)] == actual.tokens, "a wrong token"
            assert whole.text.startswith(actual.text)
            if actual.reason == whole.reason:
                assert actual.tokens == whole.tokens


def usage(answer: Answer) -> tuple[object, ...]:
    return tuple(getattr(answer.end, name, None) for name in ("output_tokens", "stop_string", "stop_token_id"))


@settings(max_examples=5_000 if PIPELINE == "on" else 1_000, deadline=None, derandomize=True, database=None)
@given(schedule=schedules, num_pages=st.integers(8, 24))
def test_any_schedule_gives_what_it_gives_step_after_step(schedule: tuple[Wanted, ...], num_pages: int) -> None:
    """Arrivals, stops of each kind, cancels, deadlines, adapters that change places, preemptions by lack of pages."""
    check(schedule, *(run(schedule, pipelined=pipelined, num_pages=num_pages) for pipelined in (True, False)))


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(schedule=schedules, seed=st.integers(0, 1000))
def test_so_does_a_thread_beside_whose_steps_take_any_time(schedule: tuple[Wanted, ...], seed: int) -> None:
    rng = random.Random(seed)
    beside = run(
        schedule, pipelined=True, num_pages=12, pause=lambda: time.sleep(rng.choice([0, 0, 0.0005, 0.001])),
        executor=lambda model, observation: Beside(model, observation, lambda: None),
    )  # fmt: skip
    check(schedule, beside, run(schedule, pipelined=False, num_pages=12))


def ending(reason: FinishReason, *, stop_string: bool = False, least: int = 3, step: int = 1) -> Wanted:
    """A request that ends so, not at once."""
    for number in range(0, 600, step):
        answer = undisturbed(Wanted(number))
        has_string = getattr(answer.end, "stop_string", None) is not None
        is_early = len(answer.tokens) < 1 + number % 9 or reason is FinishReason.LENGTH
        if answer.reason is reason and has_string == stop_string and is_early and len(answer.tokens) >= least:
            return Wanted(number)
    raise AssertionError("there is none")


@pytest.mark.parametrize("stop_string", [False, True], ids=["token", "string"])
def test_at_a_stop_one_row_too_many_is_computed_and_dropped(stop_string: bool) -> None:
    wanted = ending(FinishReason.STOP, stop_string=stop_string)
    pipelined, serial = (run((wanted,), pipelined=pipelined) for pipelined in (True, False))

    check((wanted,), pipelined, serial)
    assert len(pipelined.plans) == len(serial.plans) + 1


def test_at_the_full_length_no_row_too_many_is_computed() -> None:
    wanted = ending(FinishReason.LENGTH)
    pipelined, serial = (run((wanted,), pipelined=pipelined) for pipelined in (True, False))

    check((wanted,), pipelined, serial)
    assert len(pipelined.plans) == len(serial.plans)


def test_a_cancel_drops_what_is_on_its_way() -> None:
    engines = Engines(pipelined=True)
    engines.add(ending(FinishReason.LENGTH), "r")
    while not engines.answers["r"].tokens:
        engines.step()
    had = list(engines.answers["r"].tokens)
    engines.scheduler.cancel("r")
    engines.run()

    assert engines.answers["r"].reason is FinishReason.CANCELLED
    assert engines.answers["r"].tokens == had


def test_a_preempted_sequence_keeps_the_token_that_was_on_its_way() -> None:
    """And all others, which it had: it goes on where it was, in other pages."""
    schedule = tuple(Wanted(number) for number in (8, 17, 35, 44))
    pipelined = run(schedule, pipelined=True, num_pages=8)

    check(schedule, pipelined, run(schedule, pipelined=False, num_pages=40))
    assert pipelined.scheduler.counters.preemptions > 0


def test_a_slot_is_cleared_behind_the_step_that_was_launched_for_nobody() -> None:
    """The adapter's last request is cancelled while its row is on its way; another adapter wants its slot at once."""
    engines = Engines(pipelined=True)
    for wanted in (Wanted(5), Wanted(8), Wanted(2)):
        engines.add(wanted)
    engines.step()
    engines.step()
    assert engines.engine.has_work
    seen: list[int] = []
    execute = engines.model.execute

    def noting(tensors: StepTensors, newest: torch.Tensor | None = None) -> torch.Tensor:
        seen.append(int(engines.slots.contents[0]))
        return execute(tensors, newest)

    engines.model.execute = noting  # type: ignore[method-assign]
    before = int(engines.slots.contents[0])
    for request_id in ("r5", "r8", "r2"):
        engines.scheduler.cancel(request_id)
    assert engines.add(Wanted(7))
    assert seen == [before], "the step on its way was computed before the slot was another's"
    engines.run()

    assert engines.answers["r7"].tokens == undisturbed(Wanted(7)).tokens


def test_an_id_that_is_used_again_at_once_gets_nothing_of_the_row_before() -> None:
    # The second has no adapter, and so waits for no slot.
    first, second = ending(FinishReason.STOP), ending(FinishReason.LENGTH, step=4)
    engines = Engines(pipelined=True)
    engines.add(first, "same")
    while "same" in engines.open:
        engines.step()
    assert engines.engine.has_work, "a row is on its way for nobody"
    engines.add(second, "same")
    engines.run()

    assert engines.answers["same"].tokens == undisturbed(second).tokens


def test_a_prefix_is_found_only_as_far_as_it_is_known() -> None:
    """The page of the row that was too many is never published, though it is full."""
    for number in range(60):
        engines = Engines(pipelined=True)
        engines.add(Wanted(number), "first")
        engines.run()
        engines.add(Wanted(number), "second")
        engines.run()

        assert engines.answers["second"].tokens == engines.answers["first"].tokens == undisturbed(Wanted(number)).tokens


def test_a_step_that_fails_takes_the_one_behind_it_along_and_nobody_else() -> None:
    engines = Engines(pipelined=True)
    wanted = ending(FinishReason.LENGTH, least=5)
    engines.add(wanted, "r")
    while len(engines.answers["r"].tokens) < 2:
        engines.step()
    engines.model.fails = True
    engines.step()
    engines.add(wanted, "next")
    engines.run()

    assert isinstance(engines.answers["r"].end, StepFailedError)
    assert engines.scheduler.counters.step_failures == 1
    assert engines.answers["next"].tokens == undisturbed(wanted).tokens


@pytest.mark.parametrize("executor", [InTurn, lambda model, observation: Beside(model, observation, lambda: None)])
def test_an_engine_that_stops_gives_everything_back(executor: Callable[..., Executor]) -> None:
    engines = Engines(pipelined=True, executor=executor)
    for number in (5, 8, 4):
        engines.add(Wanted(number))
    engines.step()
    engines.step()
    assert engines.engine.has_work
    waiting = threading.Thread(target=engines.fence.wait)
    waiting.start()
    engines.close()
    waiting.join(5)

    assert not waiting.is_alive(), "whoever waits for steps is let go"
    assert not any(thread.name.startswith("gralora-forward") for thread in threading.enumerate())
    assert engines.slots.num_leases == 0
    assert engines.pool.counts().leased == 0


def test_an_error_of_a_request_is_an_error_pipelined_too() -> None:
    """One that ended before its first token has the error, not an empty answer."""
    engines = Engines(pipelined=True)
    engines.add(Wanted(4), "r")
    engines.step()
    engines.scheduler.cancel("r")
    engines.run()

    assert isinstance(engines.answers["r"].end, GraloraError)
    assert engines.answers["r"].tokens == []
