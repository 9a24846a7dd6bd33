"""What one tenant may still use: how many generations, and what its rates leave. Has no clock of its own."""

from __future__ import annotations

from collections.abc import Mapping

from gralora_runtime.errors import QuotaExceededError
from gralora_server.tenants.bucket import TokenBucket
from gralora_server.tenants.settings import LimitSettings

REQUESTS, TOKENS = "requests_per_s", "tokens_per_s"
STREAM_RETRY_S = 1.0  # a guess: nobody knows when one of a tenant's generations ends


class Allowance:
    """Of one tenant, by its limits. Nothing is charged to whoever is refused."""

    def __init__(self, tenant: str, limits: LimitSettings, now_s: float) -> None:
        self._tenant = tenant
        self._limits = limits
        self._streams = 0
        self._buckets = {name: TokenBucket(rate, limits.burst_s, now_s) for name, rate in rates_of(limits).items()}

    def enter(self, prompt_tokens: int, now_s: float) -> None:
        """A generation begins, which `leave` ends. Raises `QuotaExceededError`.

        The prompt's tokens are charged at once, by whatever estimate, so that not everybody gets in who comes before
        the first has begun to use anything.
        """
        self._refuse_stream()
        self._refuse_early({REQUESTS: "1 request", TOKENS: f"about {prompt_tokens} tokens of a prompt"}, now_s)
        self._streams += 1
        self.charge(REQUESTS, 1, now_s)
        self.charge(TOKENS, prompt_tokens, now_s)

    def charge(self, limit: str, units: int, now_s: float) -> None:
        """Used, or, if it is negative, not used after all."""
        bucket = self._buckets.get(limit)
        if bucket is not None:
            bucket.charge(units, now_s)

    def leave(self) -> None:
        self._streams -= 1

    def change(self, limits: LimitSettings, now_s: float) -> None:
        """Others from now on. What is used and owed stays so."""
        rates = rates_of(limits)
        for name, rate in rates.items():
            bucket = self._buckets.setdefault(name, TokenBucket(rate, limits.burst_s, now_s))
            bucket.change(rate, limits.burst_s, now_s)
        self._buckets = {name: self._buckets[name] for name in rates}
        self._limits = limits

    def is_whole(self, now_s: float) -> bool:
        """Nothing runs and nothing is used: a new one would be the same."""
        return self._streams == 0 and all(bucket.is_full(now_s) for bucket in self._buckets.values())

    def _refuse_stream(self) -> None:
        limit = self._limits.streams
        if limit is not None and self._streams >= limit:
            asked = f"1 generation beside the {self._streams} that run"
            raise QuotaExceededError(self._tenant, "streams", limit, asked, STREAM_RETRY_S)

    def _refuse_early(self, asked: Mapping[str, str], now_s: float) -> None:
        """The limit that has to be waited for longest is the one to name."""
        waits_s = {name: bucket.wait_s(now_s) for name, bucket in self._buckets.items()}
        limit = max(waits_s, key=lambda name: waits_s[name], default="")
        if limit and waits_s[limit]:
            raise QuotaExceededError(self._tenant, limit, rates_of(self._limits)[limit], asked[limit], waits_s[limit])


def rates_of(limits: LimitSettings) -> dict[str, float]:
    """Those that are limited, by their names in the configuration."""
    rates = {REQUESTS: limits.requests_per_s, TOKENS: limits.tokens_per_s}
    return {name: rate for name, rate in rates.items() if rate is not None}
