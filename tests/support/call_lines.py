"""The log's lines of calls, from whatever else a test's processes logged."""

import json

import pytest

LOGGER = "gralora_server.calls"


def call_lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, object]]:
    """One object for each call that ended, in the order in which they did."""
    return [json.loads(record.getMessage()) for record in caplog.records if record.name == LOGGER]
