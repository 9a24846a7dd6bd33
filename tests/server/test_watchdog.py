"""A step that does not end is noticed, and a process that was suspended is not blamed for it."""

from __future__ import annotations

import asyncio
import threading
import time

import grpc
import pytest
from grpc_health.v1 import health_pb2
from support.fake_engine import finished
from support.grpc_harness import ask, ask_once, failure, read_all, served

from gralora_server.watchdog import StepWatch, watching

Status = health_pb2.HealthCheckResponse


def test_a_steps_time_is_counted_from_its_beginning() -> None:
    watch = StepWatch(pause_s=1.0)

    assert [watch.look(now_s, began_s=9.5) for now_s in (10.0, 11.0, 12.5)] == [0.5, 1.5, 3.0]


def test_the_next_step_begins_anew_and_waiting_for_work_is_no_step() -> None:
    watch = StepWatch(pause_s=1.0)
    looks = [(10.0, 9.5), (11.0, 10.75), (12.0, None), (13.0, None), (14.0, 13.5)]

    assert [watch.look(now_s, began_s) for now_s, began_s in looks] == [0.5, 0.25, 0.0, 0.0, 0.5]


@pytest.mark.parametrize("looked_before", [True, False], ids=["seen-before", "new"])
def test_time_in_which_nobody_looked_is_not_held_against_a_step(looked_before: bool) -> None:
    """An hour passed in the process's sleep, with the step begun before it."""
    watch = StepWatch(pause_s=1.0)
    watched_s = watch.look(10.0, began_s=9.5) if looked_before else watch.look(9.0, began_s=None)

    assert watch.look(3610.0, began_s=9.5) == watched_s + 2.0
    assert watch.look(3611.0, began_s=9.5) == watched_s + 3.0


def test_who_watches_is_told_of_each_turn_and_in_the_end_to_give_up() -> None:
    told: list[bool] = []
    turned, gave_up = threading.Semaphore(0), threading.Event()
    began_s: float | None = None

    def on_change(stuck: bool) -> None:
        told.append(stuck)
        turned.release()

    with watching(lambda: began_s, limit_s=0.2, on_change=on_change, give_up=gave_up.set):
        began_s = time.monotonic()
        assert turned.acquire(timeout=30)
        began_s = None
        assert turned.acquire(timeout=30)
        assert told == [True, False]
        began_s = time.monotonic()
        assert gave_up.wait(30)

    assert told == [True, False, True]


async def test_a_stuck_engine_takes_no_requests_and_is_not_healthy_until_its_step_ends() -> None:
    async with served() as s:
        running = s.client.generation.StreamGenerate(ask("r1"))
        await running.read()
        await s.server.set_stuck(True)
        failed = await failure(s.client.generation.Generate(ask_once("r2")))
        ill = await s.client.health.Check(health_pb2.HealthCheckRequest())
        await s.server.set_stuck(False)
        well = await s.client.health.Check(health_pb2.HealthCheckRequest())
        s.engine.streams["r1"].put(finished())
        messages = await read_all(running)

    assert (failed.code, failed.info.reason) == (grpc.StatusCode.UNAVAILABLE, "ENGINE_STUCK")
    assert "RetryInfo" in failed.details
    assert (ill.status, well.status) == (Status.NOT_SERVING, Status.SERVING)
    assert messages[-1].HasField("finished")


async def test_a_step_that_ends_while_the_server_drains_does_not_make_it_healthy_again() -> None:
    async with served() as s:
        await s.server.set_stuck(True)
        await asyncio.wait_for(s.server.drain(0.0), 10)
        await s.server.set_stuck(False)

        assert (await s.client.health.Check(health_pb2.HealthCheckRequest())).status == Status.NOT_SERVING
