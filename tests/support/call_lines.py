"""The log's lines of calls, from whatever else a test's processes logged."""

import pytest

LOGGER = "gralora_server.calls"


def call_lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, object]]:
    """One object for each call that ended, in the order in which they did."""
    return [dict(record.args[0].fields) for record in caplog.records if record.name == LOGGER]
