"""Results of runs that never took place: plausible figures, to test reports with."""

from __future__ import annotations

from dataclasses import replace

from gralora_server.loadtest.overload import overload
from gralora_server.loadtest.patience import Patience
from gralora_server.loadtest.record import OK, RequestRecord, Try
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


def overloaded(**changes: object) -> RunResult:
    """Two tenants, one of which floods the server from 20 s to 40 s, is refused, and comes again."""
    records = [one for second in range(60) for one in _second(second)]
    window, slo = Window(5, 60), Slo()
    settings = {
        "window": window,
        "slo": slo,
        "patience": Patience(deadline_s=10.0, retries=1),
        "weights": {"light": 2.0},
        "peak": (20.0, 40.0),
    }
    timeline = [Sample(at_s=t, tokens=50, requests_ended=5, in_flight=5, memory_bytes=10**9 + t) for t in range(1, 61)]
    return run_of("server", 2).model_copy(
        update={
            "summary": summarise("server", records, window=window, slo=slo, generator=HEALTHY),
            "timeline": tuple(timeline),
            "overload": overload(records, **(settings | changes)),
        }
    )


def _second(second: int) -> list[RequestRecord]:
    """Of three requests of the flood one is served at once, one comes again, and one does in vain."""
    light = _request("light", second + 0.1, 0.3, ())
    due_s, calm = second + 0.5, not 20 <= second < 42
    if calm:
        return [light, *(_request("flood", due_s, 0.4, ()) for _ in range(2))]
    full = Try(sent_s=due_s, ended_s=due_s + 0.004, status="RESOURCE_EXHAUSTED", reason="TOO_LATE", retry_s=2.0)
    flood = [
        _request("flood", due_s, 1.5, ()),
        _request("flood", due_s, 1.5, (full,)),
        _request("flood", due_s, None, (full, replace(full, reason="QUEUE_FULL"))),
    ]
    return [light, *flood]


def _request(tenant: str, due_s: float, ttft_s: float | None, refusals: tuple[Try, ...]) -> RequestRecord:
    """`ttft_s` from the last try on; None: its tries end with a refusal."""
    sent_s = refusals[-1].ended_s + 2.0 if refusals else due_s
    times = () if ttft_s is None else tuple(sent_s + ttft_s + 0.05 * i for i in range(10))
    last = () if ttft_s is None else (Try(sent_s=sent_s, ended_s=times[-1], status=OK),)
    tries = (*refusals, *last)
    return RequestRecord(
        adapter=tenant,
        intended_s=due_s,
        sent_s=due_s,
        token_times_s=times,
        finished_s=tries[-1].ended_s,
        status=tries[-1].status,
        counted=due_s >= 5,
        tenant=tenant,
        prompt_tokens=20,
        tries=tries,
    )


def single() -> LoadTestResult:
    return result_of(run_of("multi-adapter server", 16))


def comparison() -> LoadTestResult:
    runs = [run_of("together", n) for n in (1, 4, 16, 64)]
    runs += [run_of("in turn", n, itl_s=0.04 * n, ttft_s=0.5 * n) for n in (1, 4, 16)]
    refusal = Refusal(system="in turn", num_adapters=64, why="64 merged models need 34 GB; the budget is 20 GB")
    return result_of(*runs, refusals=(refusal,))
