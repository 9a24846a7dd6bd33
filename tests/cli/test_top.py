"""`gralora top`, once and in a terminal, against a server whose engine the test plays."""

from __future__ import annotations

import asyncio
import io
import os
import pty
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
from rich.console import Console
from support.fake_engine import INFO, LOAD, FakeEngine, request_activity
from support.grpc_harness import served
from support.tenants import OPERATOR, secret_of, two_tenants

from gralora_runtime.observation.timeline import Stage
from gralora_runtime.observation.usage import Tally
from gralora_server.cli.app import run
from gralora_server.cli.output import ExitCode
from gralora_server.cli.top_screen import Screen, draw, seconds, spark, why
from gralora_server.live.history import Point
from gralora_server.tenants.request_ids import scoped
from gralora_server.tenants.usage import Counts

POINTS = {name: [1.0, None, 4.0] for name in Point.__dataclass_fields__}


def busy() -> FakeEngine:
    """An engine with two requests under way, one of them a tenant's."""
    engine, activity = FakeEngine(), FakeEngine().activity()
    engine.activity = lambda: replace(activity, adapters={"poet@2": Tally(3, 40, 50), "other": Tally()})
    engine.under_way = lambda: [
        request_activity(scoped("acme", "waits")),
        request_activity("runs", tenant="adapter:poet", stage=Stage.DECODE, hold=None, preemptions=0, age_s=70.0),
    ]
    return engine


def text_of(screen: Screen, height: int | None) -> str:
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(draw(screen, height=height))
    return console.export_text()


def screen(**changes: object) -> Screen:
    facts: dict[str, object] = {
        "info": INFO,
        "load": LOAD,
        "points": POINTS,
        "phases": {"forward": 0.05},
        "requests": [request_activity(f"r{number}") for number in range(40)],
        "traffic": {},
        "adapters": {},
        "adapter_rates": {},
        "used": {},
        "tenant_rates": {},
    }
    return Screen(**facts | changes)  # type: ignore[arg-type]


async def test_once_prints_what_is_so_now(capsys: pytest.CaptureFixture[str]) -> None:
    async with served(engine=busy()) as s:
        s.server.usage.add("acme", "poet", Counts(1, 2, 3, 44, 5, 6))
        options = ["--interval-s", "0.2", "--once", "--address", f"127.0.0.1:{s.port}"]
        code = await asyncio.to_thread(run, ["top", *options])
    out = capsys.readouterr().out
    lines = {line.split()[0]: line for line in out.splitlines() if line.strip()}

    assert code == ExitCode.OK
    assert "running 1   waiting 2" in out
    assert lines["waits"].split()[1:3] == ["acme", "poet@2"]
    assert "for KV pages, 2 before it; gave way once" in lines["waits"]
    assert "answering" in lines["runs"]
    assert lines["poet@2"].split()[1:] == ["resident", "1.2", "KiB", "2", "–", "50", "3"]
    assert lines["acme"].split()[1:] == ["–", "–", "1", "44"]


async def test_who_is_no_admin_is_told_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    codes = []
    async with served(engine=busy(), tenancy=two_tenants()) as s:
        for secret in (secret_of("acme"), OPERATOR):
            monkeypatch.setenv("GRALORA_TOKEN", secret)
            options = ["--interval-s", "0.2", "--once", "--address", f"127.0.0.1:{s.port}"]
            codes.append(await asyncio.to_thread(run, ["top", *options]))

    assert codes == [ExitCode.FAILED, ExitCode.OK]
    assert "GetActivity" in capsys.readouterr().err


async def test_in_a_terminal_it_goes_on_until_ctrl_c_and_leaves_the_terminal_as_it_was() -> None:
    def watched(port: int) -> tuple[bytes, int]:
        ours, theirs = pty.openpty()
        command = [sys.executable, "-c", "from gralora_server.cli import main; main()", "top", "--interval-s", "0.2"]
        environment = os.environ | {"TERM": "xterm", "COLUMNS": "160", "LINES": "40"}
        with subprocess.Popen(
            [*command, "--address", f"127.0.0.1:{port}"], stdin=theirs, stdout=theirs, stderr=theirs, env=environment
        ) as process:
            os.close(theirs)
            seen = b""
            while seen.count(b"why it waits") < 3:
                seen += os.read(ours, 1 << 16)
            process.send_signal(signal.SIGINT)
            while True:
                try:
                    seen += os.read(ours, 1 << 16)
                except OSError:  # it has ended
                    break
        os.close(ours)
        return seen, process.returncode

    async with served(engine=busy()) as s:
        seen, code = await asyncio.to_thread(watched, s.port)

    assert code == ExitCode.OK
    assert seen.rstrip().rfind(b"\x1b[?1049l") > seen.find(b"\x1b[?1049h") >= 0
    assert b"Traceback" not in seen


def test_requests_that_do_not_fit_are_counted() -> None:
    text = text_of(screen(), height=30)

    assert len(text.splitlines()) <= 30
    assert "Requests: 40, 24 not shown" in text
    assert "not shown" not in text_of(screen(), height=None)


def test_a_line_is_as_high_as_its_highest_and_has_a_gap_where_nothing_was() -> None:
    assert spark([0.0, None, 5.0, 10.0]) == "▁ ▅█"
    assert spark([None, 0.0]) == " ▁"
    assert len(spark([1.0] * 500)) == 60


def test_times_are_written_for_people() -> None:
    assert [seconds(value) for value in (0.0123, 0.25, 3.21, 600.0)] == ["12.3 ms", "250 ms", "3.2 s", "10 min"]


def test_every_stage_says_what_it_waits_for_if_it_does() -> None:
    said = {stage: why(request_activity(stage=stage, hold=None, preemptions=0)) for stage in Stage}

    assert {stage for stage, text in said.items() if text} == {Stage.TOKENIZE, Stage.ADAPTER, Stage.PAUSED}
    assert why(request_activity(ahead=0)) == "for KV pages, next; gave way once"
