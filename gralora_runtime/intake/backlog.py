"""Which requests are under way, of whom, and whether one more may come. Lives on the event loop's thread alone.

A tenant may take four times of what then is left free, of requests and of tokens: alone at most four fifths of all, two
at most four ninths each. So there is always room for somebody who comes anew.
"""

from __future__ import annotations

from dataclasses import dataclass

from gralora_runtime.request import GenerationRequest

OF_WHAT_IS_FREE = 4


@dataclass(slots=True, eq=False)
class TenantBacklog:
    """Of one tenant that has requests under way."""

    tenant: str
    weight: float
    waiting: int = 0  # for their first token
    waiting_tokens: int = 0  # of their prompts, as far as those are known
    running: int = 0

    @property
    def requests(self) -> int:
        return self.waiting + self.running


@dataclass(slots=True, eq=False)
class Place:
    """One request, from its arrival to its end."""

    line: TenantBacklog
    tokens: int = 0  # of its prompt, once they are counted
    runs: bool = False  # its first token has come


class Backlog:
    """All requests under way."""

    def __init__(self, *, max_requests: int, max_tokens: int) -> None:
        """`max_requests` under way, and `max_tokens` of prompts whose first token has not come."""
        self._max_requests = max_requests
        self._max_tokens = max_tokens
        self._lines: dict[str, TenantBacklog] = {}
        self.requests = 0
        self.waiting = 0
        self.waiting_tokens = 0
        self.weight = 0.0  # of all tenants with requests

    def line(self, tenant: str, weight: float) -> TenantBacklog:
        """A tenant's. One that has no request yet is in no sum."""
        return self._lines.get(tenant) or TenantBacklog(tenant, weight)

    def full_of_requests(self, request: GenerationRequest, line: TenantBacklog) -> str | None:
        """Why one more would be too many."""
        if self.requests >= self._max_requests:
            return f"{self.requests} requests are under way"
        if line.requests >= OF_WHAT_IS_FREE * (self._max_requests - self.requests):
            return f"{line.requests} requests of this tenant are under way"
        limit = request.max_queued_requests
        if limit is not None and line.waiting >= limit:
            return f"{line.waiting} requests of this tenant are waiting, its limit queued_requests is {limit}"
        return None

    def full_of_tokens(self, request: GenerationRequest, place: Place, tokens: int) -> str | None:
        """Why so many more would be too many; a prompt that is alone is never too long."""
        line = place.line
        free = self._max_tokens - self.waiting_tokens
        if self.waiting_tokens and (tokens > free or line.waiting_tokens >= OF_WHAT_IS_FREE * free):
            return f"prompts of {self.waiting_tokens} tokens are waiting"
        limit = request.max_queued_tokens
        if limit is not None and line.waiting_tokens and line.waiting_tokens + tokens > limit:
            found = f"prompts of {line.waiting_tokens} tokens of this tenant are waiting"
            return f"{found}, its limit queued_tokens is {limit}"
        return None

    def enter(self, tenant: str, weight: float) -> Place:
        """A request came."""
        line = self._lines.get(tenant)
        if line is None:
            line = self._lines[tenant] = TenantBacklog(tenant, weight)
            self.weight += weight
        elif line.weight != weight:
            self.weight += weight - line.weight
            line.weight = weight
        line.waiting += 1
        self.requests += 1
        self.waiting += 1
        return Place(line)

    def count(self, place: Place, tokens: int) -> None:
        """Its prompt has so many."""
        place.tokens = tokens
        place.line.waiting_tokens += tokens
        self.waiting_tokens += tokens

    def start(self, place: Place) -> None:
        """Its first token has come."""
        if not place.runs:
            self._stop_waiting(place)
            place.runs = True
            place.line.running += 1

    def leave(self, place: Place) -> None:
        """It has ended, or was refused."""
        line = place.line
        if place.runs:
            line.running -= 1
        else:
            self._stop_waiting(place)
        self.requests -= 1
        if not line.requests:
            del self._lines[line.tenant]
            self.weight -= line.weight

    def _stop_waiting(self, place: Place) -> None:
        place.line.waiting -= 1
        place.line.waiting_tokens -= place.tokens
        self.waiting -= 1
        self.waiting_tokens -= place.tokens
