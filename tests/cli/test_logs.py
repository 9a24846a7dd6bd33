"""What the log looks like: a line a request, for people or programs, and none that comes a thousand times."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest

from gralora_server.call_line import CallLine
from gralora_server.cli import logs

CALLS = logging.getLogger("gralora_server.calls")
FIELDS = {"method": "Generate", "request_id": "bad\nline", "adapter": "", "outcome": "stop", "decode_ms": 12.5}


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    level, handlers = logging.root.level, logging.root.handlers.copy()
    yield
    logging.root.setLevel(level)
    logging.root.handlers[:] = handlers


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_a_line_for_people_is_one_line_whatever_a_client_sent(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info")
    CALLS.info("%s", CallLine(FIELDS))
    (line,) = lines(capsys)
    assert line.endswith('method=Generate request_id="bad\\nline" adapter="" outcome=stop decode_ms=12.5')


def test_a_line_for_programs_has_the_same_fields(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", "json")
    CALLS.info("%s", CallLine(FIELDS))
    (line,) = lines(capsys)
    found = json.loads(line)
    assert found.items() >= FIELDS.items()
    assert (found["level"], found["logger"]) == ("INFO", "gralora_server.calls")
    assert "T" in found["time"]


def test_other_lines_have_a_message_and_a_traceback_in_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", "json")
    try:
        int("odd")
    except ValueError:
        logging.getLogger("x").exception("it is %s", "broken")
    (line,) = lines(capsys)
    found = json.loads(line)
    assert found["message"] == "it is broken"
    assert "ValueError: invalid literal" in found["traceback"]


def test_a_warning_that_comes_again_and_again_is_counted_and_requests_are_all_there(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = 100.0
    monkeypatch.setattr(logs.time, "monotonic", lambda: now_s)
    logs.configure("info")

    def warn(at: int) -> None:
        logging.getLogger("x").warning("it is full: %d", at)
        logging.getLogger("x").info("request %d", at)

    for at in range(logs.MOST + 30):
        warn(at)
    now_s += logs.QUIET_S
    warn(1000)

    found = lines(capsys)
    assert sum("request" in line for line in found) == logs.MOST + 31
    full = [line for line in found if "full" in line]
    assert len(full) == logs.MOST + 1
    assert full[-1].endswith("it is full: 1000 (30 more were not logged)")
