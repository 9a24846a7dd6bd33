"""How long a user waits for an answer, and how often it asks again. Sends nothing itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gralora_server.loadtest.record import Try


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """A user asks again only if it was told when, and then exactly when it was told."""

    deadline_s: float | None = None  # of each try, from its sending: the call's timeout. None: it waits for ever
    retries: int = 0
    total_s: float | None = None  # after a request was due: no try is sent later. None: at any time

    def again_s(self, tries: Sequence[Try], due_s: float) -> float | None:
        """When to send it again after these tries, in seconds from the start of the run; None: not any more."""
        last = tries[-1]
        if last.retry_s is None or len(tries) > self.retries:
            return None
        at_s = last.ended_s + last.retry_s
        return at_s if self.total_s is None or at_s <= due_s + self.total_s else None
