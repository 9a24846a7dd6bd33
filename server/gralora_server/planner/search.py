"""The highest rate for a number of adapters, and the largest number at a rate, by trying them in simulated time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from gralora_runtime.errors import ConfigError
from gralora_server.loadtest.summary import Generator, Slo, Summary, Window, summarise
from gralora_server.loadtest.trace import Trace
from gralora_server.planner.mix import customers
from gralora_server.planner.profile import Profile
from gralora_server.planner.simulate import ServerPlan, Simulated, simulate

# Long enough for a queue that grows to be seen, with enough requests to be counted, and not more than it takes.
DURATION_S, MIN_REQUESTS, MAX_REQUESTS, WARMUP_SHARE = 60.0, 300, 2000, 0.2
SLOWEST = 10_000  # times slower than what is possible at most is the slowest traffic that is tried
RATE_STEP = 1.02  # rates nearer to each other than this are not told apart
MAX_ADAPTERS = 1 << 20
PERFECT = Generator(send_lag_p99_s=0.0, wake_lag_p99_s=0.0, cpu_share=0.0, limited=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """One point: so many adapters at so many requests a second, and what their customers get."""

    num_adapters: int
    rate_per_s: float  # of all adapters together; 0: not even the slowest traffic meets the objective
    summary: Summary
    server: ServerPlan
    loads_per_request: float
    memory_bytes: int  # with every pool and cache as full as it gets


@dataclass(frozen=True, slots=True, kw_only=True)
class Planner:
    """`trace`: requests for these adapters at this rate, with this warm-up and duration in seconds."""

    profile: Profile
    mix: Mapping[str, int]  # bytes in the pool, by adapter
    trace: Callable[[Sequence[str], float, float, float], Trace]
    slo: Slo
    slo_share: float  # of the requests that must meet it
    memory_bytes: int
    host_cache_bytes: int
    max_adapter_slots: int
    request_tokens: int  # the longest, prompt and output

    def highest_rate(self, num_adapters: int) -> Planned:
        """Raises ConfigError if the memory does not even hold the server and one adapter."""
        sizes = customers(self.mix, num_adapters)
        server = self.server(sizes)
        high = self._more_than_possible()
        low = high / SLOWEST
        best = self._try(sizes, server, low)
        if not self._met(best):
            return replace(best, rate_per_s=0.0)
        while high / low > RATE_STEP:
            middle = (low * high) ** 0.5
            tried = self._try(sizes, server, middle)
            low, high, best = (middle, high, tried) if self._met(tried) else (low, middle, best)
        return best

    def most_adapters(self, rate_per_adapter: float) -> Planned | None:
        """The largest number whose traffic meets the objective; None if not even one does."""
        best, low, high = None, 0, 1
        while high <= MAX_ADAPTERS and self._met(tried := self._for_each(high, rate_per_adapter)):
            best, low, high = tried, high, 2 * high
        while high - low > max(1, low // 50):
            middle = (low + high) // 2
            tried = self._for_each(middle, rate_per_adapter)
            low, high, best = (middle, high, tried) if self._met(tried) else (low, middle, best)
        return best

    def server(self, sizes: Mapping[str, int]) -> ServerPlan:
        """Pages for as many of the longest requests as run at once; the memory that is left is the adapters'."""
        settings = self.profile.settings
        pages = settings["max_num_seqs"] * -(-self.request_tokens // settings["page_size"])
        kv_bytes = pages * settings["page_size"] * self.profile.kv_token_bytes
        wanted, largest = sum(sizes.values()), max(sizes.values())
        left = self.memory_bytes - self.profile.server_bytes - kv_bytes
        pool_bytes = wanted if wanted <= left else left - self.host_cache_bytes
        if pool_bytes < largest:
            needed = self.profile.server_bytes + kv_bytes + self.host_cache_bytes + largest
            raise ConfigError(
                f"the memory is {self.memory_bytes} bytes, but the model, {pages} KV pages, the host cache and one "
                f"adapter need {needed}"
            )
        return ServerPlan(
            **settings, num_pages=pages, adapter_pool_bytes=pool_bytes, max_adapter_slots=self.max_adapter_slots
        )

    def memory_of(self, server: ServerPlan, resident_bytes: int, evicted_bytes: int) -> int:
        """With so many bytes of adapters in the pool, and after so many have left it."""
        kv_bytes = server.num_pages * server.page_size * self.profile.kv_token_bytes
        cached_bytes = min(evicted_bytes, self.host_cache_bytes)
        return self.profile.server_bytes + kv_bytes + resident_bytes + cached_bytes

    def _for_each(self, num_adapters: int, rate_per_adapter: float) -> Planned:
        sizes = customers(self.mix, num_adapters)
        return self._try(sizes, self.server(sizes), num_adapters * rate_per_adapter)

    def _try(self, sizes: Mapping[str, int], server: ServerPlan, rate_per_s: float) -> Planned:
        duration_s = min(max(DURATION_S, MIN_REQUESTS / rate_per_s), MAX_REQUESTS / rate_per_s)
        trace = self.trace(list(sizes), rate_per_s, WARMUP_SHARE * duration_s, duration_s)
        done = simulate(trace, self.profile, server, sizes, warm=True)
        wanted = sum(sizes.values())
        return Planned(
            num_adapters=len(sizes),
            rate_per_s=rate_per_s,
            summary=summary_of(done, trace, self.slo),
            server=server,
            loads_per_request=done.loads / len(done.records),
            memory_bytes=self.memory_of(
                server, min(wanted, server.adapter_pool_bytes), max(0, wanted - server.adapter_pool_bytes)
            ),
        )

    def _met(self, planned: Planned) -> bool:
        return planned.summary.goodput_share >= self.slo_share

    def _more_than_possible(self) -> float:
        """Requests a second: as if prompts and adapters cost nothing and every output were one token long."""
        rows = self.profile.settings["max_num_seqs"]
        return 2 * rows / self.profile.base_s(rows)


def summary_of(done: Simulated, trace: Trace, slo: Slo) -> Summary:
    """Of a simulated run, as of a real one."""
    window = Window(trace.warmup_s, trace.duration_s)
    return summarise("predicted", done.records, window=window, slo=slo, generator=PERFECT)
