"""What the command line sets in the environment, and what it leaves alone."""

from __future__ import annotations

import pytest

from gralora_server.cli.environment import limit_spinning


def test_spinning_is_limited_unless_the_user_chose_a_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    for chosen in (None, "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        environment = {} if chosen is None else {chosen: "mine"}
        monkeypatch.setattr("os.environ", environment)
        limit_spinning()

        assert environment == ({"GOMP_SPINCOUNT": "10000"} if chosen is None else {chosen: "mine"})
