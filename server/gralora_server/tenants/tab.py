"""What one generation runs up, charged to its tenant as it is used. Knows no engine and no deltas."""

from __future__ import annotations

from collections.abc import Callable

from gralora_server.tenants.allowance import REQUESTS, TOKENS, Allowance


class Tab:
    """Open from the admission, which charged one request and an estimate of its prompt, until `close`."""

    def __init__(self, allowance: Allowance, clock: Callable[[], float], prompt_tokens: int) -> None:
        self._allowance = allowance
        self._clock = clock
        self._prompt_tokens = prompt_tokens  # as charged
        self._is_taken_on = False

    def take_on(self) -> None:
        """The engine has it. What it does for a prompt that never comes to a first token only the estimate says."""
        self._is_taken_on = True

    def start(self, prompt_tokens: int) -> None:
        """So long is the prompt really."""
        self._charge(TOKENS, prompt_tokens - self._prompt_tokens)
        self._prompt_tokens = prompt_tokens

    def generate(self, num_tokens: int) -> None:
        self._charge(TOKENS, num_tokens)

    def refuse(self) -> None:
        """Somebody else had no room for it. Nothing is charged, unless it had begun."""
        if not self._is_taken_on:
            self._charge(REQUESTS, -1)

    def close(self) -> None:
        if not self._is_taken_on:
            self._charge(TOKENS, -self._prompt_tokens)
        self._allowance.leave()

    def _charge(self, limit: str, units: int) -> None:
        self._allowance.charge(limit, units, self._clock())
