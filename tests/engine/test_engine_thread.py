"""When a step's outputs leave the engine's thread. The engine here only says in which order it was called."""

from __future__ import annotations

import threading
import time

import pytest

from gralora_runtime.observation.steps import StepObservation
from gralora_runtime.stepping.engine import Engine
from gralora_runtime.stepping.engine_thread import EngineThread
from gralora_runtime.stepping.fence import StepFence

WAIT_S = 10


class Steps:
    """An engine, and its scheduler, of three steps whose output is their number. `fails`: where the one of `broken`."""

    def __init__(self, events, *, fails="", broken=-1):
        self.observation = StepObservation()
        self.scheduler = self
        self.is_failing = False
        self.ended = threading.Event()
        self.running = threading.Event()
        self.go_on = threading.Event()
        self.go_on.set()
        self._number = 0
        self._events = events
        self._fails, self._broken = fails, broken

    @property
    def has_work(self):
        return self._number < 3

    def step(self, before_forward):
        number = self._number
        self._events.append(f"build {number}")
        self._fail("build")
        before_forward()
        self._events.append(f"forward {number}")
        self.running.set()
        assert self.go_on.wait(WAIT_S)
        self._fail("forward")
        self._number += 1
        return [number]

    def finish(self):
        return []

    def close(self):
        self.ended.set()

    def _fail(self, where):
        if (where, self._number) == (self._fails, self._broken):
            raise RuntimeError(f"{where} is broken")


def thread_of(engine, events, **options):
    return EngineThread(
        engine,
        prepare=lambda: None,
        deliver=lambda outputs: events.append(f"output {outputs[0]}"),
        on_death=lambda: events.append("death"),
        **options,
    )


def run(thread, engine):
    """Until the engine's work is done, or the thread has ended."""
    thread.start()
    while engine.has_work and not engine.ended.wait(0.01):
        pass
    thread.stop()


def stop_in_mid_step(thread, engine):
    engine.go_on.clear()
    thread.start()
    assert engine.running.wait(WAIT_S)
    stopping = threading.Thread(target=thread.stop)
    stopping.start()
    while not thread._stopping:
        pass
    engine.go_on.set()
    stopping.join(WAIT_S)


def events_of(**failure):
    events: list[str] = []
    engine = Steps(events, **failure)
    run(thread_of(engine, events), engine)
    return events


def test_outputs_go_out_when_the_next_forward_pass_begins_and_the_last_at_once():
    assert events_of() == [
        "build 0", "forward 0",
        "build 1", "output 0", "forward 1",
        "build 2", "output 1", "forward 2",
        "output 2",
    ]  # fmt: skip


@pytest.mark.parametrize("where", ["build", "forward"])
def test_outputs_of_the_step_before_a_failure_go_out_before_the_news_of_it(where):
    events = events_of(fails=where, broken=1)

    assert events[-1] == "death"
    assert events.count("output 0") == 1


def test_outputs_of_the_step_that_runs_when_it_is_stopped_go_out():
    events: list[str] = []
    engine = Steps(events)
    stop_in_mid_step(thread_of(engine, events), engine)

    assert events == ["build 0", "forward 0", "output 0"]


def test_engines_that_take_turns_hand_over_before_they_wait_for_theirs():
    events: list[str] = []

    class Turn:
        def __enter__(self):
            events.append("my turn")

        def __exit__(self, *_):
            events.append("yours")

    engine = Steps(events)
    run(thread_of(engine, events, turn=Turn()), engine)

    assert events[:6] == ["my turn", "build 0", "forward 0", "yours", "output 0", "my turn"]


def test_a_step_without_a_plan_hands_over_what_came_before_it_first():
    """So a request's end never overtakes its tokens, and its id is free only after both."""
    events: list[str] = []

    class NothingToCompute:
        def plan(self):
            return None

        def take_outputs(self):
            events.append("taken")
            return ["the end"]

    engine = Engine(NothingToCompute(), batch=None, executor=None, observation=StepObservation(), fence=StepFence())

    assert engine.step(lambda: events.append("handed over")) == ["the end"]
    assert events == ["handed over", "taken"]


def test_a_delivery_that_fails_when_it_is_stopped_still_frees_everything():
    """As when the event loop has gone."""
    events: list[str] = []
    engine = Steps(events)

    def deliver(outputs):
        raise RuntimeError("the loop is closed")

    thread = EngineThread(engine, prepare=lambda: None, deliver=deliver, on_death=lambda: events.append("death"))
    stop_in_mid_step(thread, engine)

    assert engine.ended.is_set()
    assert events[-1] == "death"


def test_it_says_since_when_it_works_on_a_step_and_that_it_waits() -> None:
    events = []
    engine = Steps(events)
    thread = thread_of(engine, events)
    before_s = time.monotonic()
    engine.go_on.clear()
    thread.start()
    assert engine.running.wait(WAIT_S)
    assert before_s <= thread.busy_since_s <= time.monotonic()
    engine.go_on.set()
    thread.stop()

    assert thread.busy_since_s is None
