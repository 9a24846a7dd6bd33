"""`python -m benchmarks.metrics_overhead`: what counting, and being scraped once a second, costs in throughput.

On: the engine as it is served, its page scraped by a thread of the same process, whose time counts too. Off: the same
engine with recorders that do nothing, and no scrape. Tokens are compared before a time is kept.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import busy_share, facts
from benchmarks.measurement import Contender, Run, SameTokens, interleave, ratio
from benchmarks.onlooker import looking
from benchmarks.own_engine import answer
from benchmarks.workload import FULL, Request, make_prompts, make_requests
from gralora_runtime.async_engine import AsyncEngine
from gralora_runtime.config import EngineConfig
from gralora_runtime.observation.histogram import Owner
from gralora_runtime.observation.requests import RequestMeter, RequestObservation
from gralora_runtime.observation.steps import Phase, StepObservation
from gralora_runtime.plan import StepPlan
from gralora_runtime.request import Delta, GenerationRequest, Prompt, SamplingParams, StoppingParams
from gralora_server.config import MetricsConfig
from gralora_server.gate import Gate
from gralora_server.metrics.page import MetricsPage
from gralora_server.model_fetch import ensure_default_model
from gralora_server.tenants.usage import Usage

ON, OFF = "metrics on, scraped once a second", "metrics off"
OUT = Path(__file__).parent / "results" / "metrics-overhead.json"
SCRAPE_INTERVAL_S = 1.0


class NoSteps(StepObservation):
    """Calls, and writes nothing down."""

    def timed(self, phase: Phase, work: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:  # noqa: ARG002
        return work(*args, **kwargs)

    def count(self, plan: StepPlan) -> None:
        pass


class NoMeter(RequestMeter):
    """Of a request that nobody follows."""

    __slots__ = ()

    def admit(self, adapter: str, num_prompt: int) -> None:
        pass

    def deliver(self, delta: Delta, now_s: float) -> None:
        pass


class NoRequests(RequestObservation):
    """Makes meters that do nothing."""

    def meter(self, submitted_s: float, whose: Owner | None = None) -> RequestMeter:  # noqa: ARG002
        return NoMeter(self, submitted_s)

    def receive(self) -> None:
        pass

    def end(self, outcome: str) -> None:
        pass


class Served:
    """One engine on one event loop, which runs while requests do."""

    def __init__(self, model_dir: Path, num_rows: int) -> None:
        self._loop = asyncio.Runner()
        config = EngineConfig(model=model_dir, max_num_seqs=num_rows, enable_prefix_cache=False)
        self.engine = self._loop.run(AsyncEngine.start(config))
        self._parts = self.engine._parts  # noqa: SLF001  # the recorders are no setting that anybody else should have
        self._recorders = {True: (self._parts.engine.observation, self.engine.requests)}
        self._recorders[False] = (NoSteps(), NoRequests(0))
        gate = Gate()
        gate.open(self.engine)
        self._page = MetricsPage(MetricsConfig(host="127.0.0.1", port=0), gate, Usage())
        self.scrapes: list[float] = []  # seconds that each took

    def run(self, requests: Sequence[Request], *, observed: bool) -> Run:
        """All of them arrive together."""
        self._parts.engine.observation, self.engine.requests = self._recorders[observed]
        if not observed:
            return self._loop.run(self._generate(requests))
        with looking(self._scrape, every_s=SCRAPE_INTERVAL_S) as taken_s:
            run = self._loop.run(self._generate(requests))
        self.scrapes += taken_s
        return run

    def close(self) -> None:
        self._page.close()
        self._loop.run(self.engine.close())
        self._loop.close()

    def _scrape(self) -> None:
        with urllib.request.urlopen(f"http://127.0.0.1:{self._page.port}/metrics", timeout=10) as page:
            page.read()

    async def _generate(self, requests: Sequence[Request]) -> Run:
        started_s = time.perf_counter()
        work = [self._one(index, request, started_s) for index, request in enumerate(requests)]
        deltas = await asyncio.gather(*work)
        return Run(tuple(answer(request, each) for request, each in zip(requests, deltas, strict=True)))

    async def _one(self, index: int, request: Request, started_s: float) -> list[tuple[float, Delta]]:
        wanted = GenerationRequest(
            request_id=f"bench-{index}",
            prompt=Prompt(token_ids=request.prompt),
            adapter=request.adapter,
            sampling=SamplingParams(temperature=0.0),
            stopping=StoppingParams(max_tokens=request.max_tokens, ignore_eos=True),
        )
        stream = await self.engine.submit(wanted)
        return [(time.perf_counter() - started_s, delta) async for delta in stream]


def measure(model_dir: Path, rounds: int) -> dict[str, Any]:
    """On and off in turn; the ratio of a round is of two runs that followed each other."""
    busy = busy_share()
    served = Served(model_dir, FULL.crowd)
    try:
        prompts = make_prompts(FULL.crowd, FULL.prompt_tokens, served.engine.info().vocab_size)
        requests = make_requests(prompts, [""], FULL.output_tokens)
        contenders = [
            Contender(name=ON, run=lambda _: [served.run(requests, observed=True)]),
            Contender(name=OFF, run=lambda _: [served.run(requests, observed=False)]),
        ]
        measured = interleave(contenders, rounds, check=SameTokens("metrics").check)
    finally:
        served.close()
    num_tokens = FULL.crowd * FULL.output_tokens
    rates = {name: [num_tokens / run.total_s for (run,) in runs] for name, runs in measured.items()}
    steps = {name: [run.decode_step_s or 0.0 for (run,) in runs] for name, runs in measured.items()}
    return {
        "workload": {
            "requests": FULL.crowd,
            "prompt_tokens": FULL.prompt_tokens,
            "output_tokens": FULL.output_tokens,
            "rounds": rounds,
        },
        "machine": facts() | {"busy_share_before": busy, "busy_share_after": busy_share()},
        "tokens_per_s": rates,
        "decode_step_s": steps,
        "scrape_s": {"count": len(served.scrapes), "median": statistics.median(served.scrapes)},
        "throughput_on_over_off": ratio(rates[ON], rates[OFF]),
        "decode_throughput_on_over_off": ratio(steps[OFF], steps[ON]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="default: SmolLM2-135M-Instruct, prepared once")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    result = measure(options.model or ensure_default_model(), options.rounds)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key.endswith("over_off")}))


if __name__ == "__main__":
    main()
