"""Results of runs that never took place: plausible figures, to test reports with."""

from __future__ import annotations

from gralora_server.loadtest.record import OK, RequestRecord
from gralora_server.loadtest.result import LoadTestResult, Refusal, RunResult, Sample, ServerStory
from gralora_server.loadtest.summary import Generator, Slo, Window, summarise

STORY = ServerStory(
    steps=400,
    mean_rows=14.2,
    phase_s={"schedule": 0.1, "build": 0.5, "forward": 18.0, "sample": 0.2, "deliver": 0.1},
    prefill_tokens=5000,
    decode_tokens=5000,
    queue_s=0.2,
    adapter_wait_s=0.03,
    adapter_loads=16,
    adapter_load_s=0.9,
    adapter_evictions=2,
    preemptions=1,
    prefix_hit_tokens=0,
)
HEALTHY = Generator(send_lag_p99_s=0.001, wake_lag_p99_s=0.004, cpu_share=0.1, limited=False)


def run_of(
    system: str,
    num_adapters: int,
    *,
    label: str = "",
    itl_s: float = 0.05,
    ttft_s: float = 0.5,
    names: tuple[str, ...] = (),
    failed: int = 0,
    generator: Generator = HEALTHY,
) -> RunResult:
    adapters = names or tuple(f"customer-{i:02}" for i in range(num_adapters))
    # From half of it to nearly all, in an order that is neither rising nor falling.
    waits_s = [ttft_s * (0.5 + (7 * i % 20) / 40) for i in range(60)]
    records = [
        RequestRecord(
            adapter=adapters[i % len(adapters)],
            intended_s=0.3 * i,
            sent_s=0.3 * i,
            token_times_s=tuple(0.3 * i + waits_s[i] + itl_s * j for j in range(40)),
            finished_s=0.3 * i + waits_s[i] + itl_s * 39,
            status=OK if i >= failed else "RESOURCE_EXHAUSTED",
            counted=True,
        )
        for i in range(60)
    ]
    label = label or f"{system}, {num_adapters} adapters"
    return RunResult(
        system=system,
        num_adapters=num_adapters,
        summary=summarise(label, records, window=Window(0, 20), slo=Slo(), generator=generator),
        timeline=tuple(
            Sample(at_s=t, tokens=100 + 7 * (t % 5), requests_ended=3, in_flight=t % 9) for t in range(1, 20)
        ),
        server=STORY,
        memory_bytes=2_000_000_000 * (1 if system == "together" else num_adapters),
    )


def result_of(*runs: RunResult, refusals: tuple[Refusal, ...] = ()) -> LoadTestResult:
    return LoadTestResult(
        title="Made up",
        made_at="2026-01-01T00:00:00+00:00",
        machine={"CPU": "none", "cores": "2"},
        workload={"arrivals": "poisson:3"},
        runs=runs,
        refusals=refusals,
    )


def four_systems() -> LoadTestResult:
    """As `gralora loadtest compare` leaves it: 1 to 64 adapters, and what does not fit into memory was not run."""
    runs = [run_of("multi-adapter server", n, itl_s=0.04 + n / 5000) for n in (1, 4, 16, 64)]
    runs += [run_of("merged models in turn", n, itl_s=0.04 * n, ttft_s=0.4 * n) for n in (1, 4)]
    runs += [run_of("merged models, swapped", n, itl_s=0.05, ttft_s=0.25 * n, failed=n // 16) for n in (16, 64)]
    runs += [run_of("one merged model (a single customer)", n, itl_s=0.04) for n in (1, 4, 16, 64)]
    refusals = [
        Refusal(system="merged models in turn", num_adapters=n, why=f"{n} merged models need {need} GB")
        for n, need in ((16, 34), (64, 130))
    ]
    return result_of(*(_short(run) for run in runs), refusals=tuple(refusals))


def _short(run: RunResult) -> RunResult:
    """Without what the report of a comparison does not show; only the multi-adapter server has a metrics page."""
    several = {"merged models in turn": 3 + 2 * run.num_adapters, "merged models, swapped": 18}
    return run.model_copy(
        update={
            "timeline": (),
            "summary": run.summary.model_copy(update={"adapters": {}}),
            "server": run.server if run.system == "multi-adapter server" else None,
            "memory_bytes": several.get(run.system, 3) * 10**9,
        }
    )


def single() -> LoadTestResult:
    return result_of(run_of("multi-adapter server", 16))


def comparison() -> LoadTestResult:
    runs = [run_of("together", n) for n in (1, 4, 16, 64)]
    runs += [run_of("in turn", n, itl_s=0.04 * n, ttft_s=0.5 * n) for n in (1, 4, 16)]
    refusal = Refusal(system="in turn", num_adapters=64, why="64 merged models need 34 GB; the budget is 20 GB")
    return result_of(*runs, refusals=(refusal,))
