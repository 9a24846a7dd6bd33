"""What became of one request, as its client saw it. All times are in seconds from the start of the run."""

from __future__ import annotations

from dataclasses import dataclass

OK = "OK"


@dataclass(frozen=True, slots=True, kw_only=True)
class Try:
    """One sending of a request. Who is refused may be told when to send it again."""

    sent_s: float
    ended_s: float
    status: str
    reason: str = ""  # the server's own word for why it failed
    retry_s: float | None = None  # it was refused before it had a token, and told to come again after this

    @property
    def refused(self) -> bool:
        return self.retry_s is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRecord:
    """Delays count from `intended_s`, when the request should have been sent: a client that is late, because the server
    or it itself is slow, does not make the server look better (no coordinated omission)."""

    adapter: str
    intended_s: float
    sent_s: float
    token_times_s: tuple[float, ...]  # when each token came; tokens of one message came together
    finished_s: float
    status: str  # OK, or the name of the gRPC status
    counted: bool  # not of the warm-up
    queue_s: float = 0.0  # as the server says
    tenant: str = ""
    prompt_tokens: int = 0
    tries: tuple[Try, ...] = ()  # the last one ended as the request did

    @property
    def ok(self) -> bool:
        return self.status == OK

    @property
    def num_tokens(self) -> int:
        return len(self.token_times_s)

    @property
    def ttft_s(self) -> float | None:
        """Time to first token; None if none came."""
        return self.token_times_s[0] - self.intended_s if self.token_times_s else None

    @property
    def refused(self) -> bool:
        """In the end: who was let in at a later try was not."""
        return bool(self.tries) and self.tries[-1].refused

    @property
    def refusals(self) -> tuple[Try, ...]:
        return tuple(one for one in self.tries if one.refused)

    @property
    def e2e_s(self) -> float:
        return self.finished_s - self.intended_s

    @property
    def send_lag_s(self) -> float:
        """How late it was sent."""
        return self.sent_s - self.intended_s

    @property
    def mean_itl_s(self) -> float | None:
        """Mean time between tokens; None with fewer than two."""
        times = self.token_times_s
        return (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None
