"""What load tests leave behind: the result, the report, and a table on the screen."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from gralora_server.cli.output import human_bytes, print_json, stderr, stdout

if TYPE_CHECKING:  # matplotlib takes a while to import, and `--help` does without it
    from gralora_server.loadtest.overload import Overload
    from gralora_server.loadtest.result import LoadTestResult, RunResult


def result(title: str, described: dict[str, str], runs: Sequence[RunResult]) -> LoadTestResult:
    from gralora_server.loadtest.machine import facts
    from gralora_server.loadtest.result import LoadTestResult

    made_at = datetime.now(UTC).isoformat(timespec="seconds")
    return LoadTestResult(title=title, made_at=made_at, machine=facts(), workload=described, runs=tuple(runs))


def write(found: LoadTestResult, out: Path) -> Path:
    """The result, the plots and the page, whose path it returns."""
    from gralora_server.loadtest.report import write_report

    out.mkdir(parents=True, exist_ok=True)
    found.write(out / "result.json")
    return write_report(found, out)


def report(found: LoadTestResult, out: Path, *, as_json: bool) -> None:
    """Write everything, and print the table and what an overload did."""
    from gralora_server.loadtest.report.overload_findings import overload_said

    page = write(found, out)
    if as_json:
        print_json(found.model_dump(mode="json"))
        return
    stdout().print(_table(found.runs))
    for refusal in found.refusals:
        stdout().print(f"{refusal.system}, {refusal.num_adapters} adapters: {refusal.why}", markup=False)
    for run in found.runs:
        if run.overload is not None:
            for sentence in overload_said(run.overload, run.summary.slo):
                stdout().print(sentence, markup=False)
            if run.overload.tenants:
                stdout().print(_tenants(run.overload))
        if run.summary.generator.limited:
            stderr().print(
                f"{run.summary.label}: the generator was the bottleneck; its figures say little.", style="red"
            )
    stdout().print(f"Report: {page}", markup=False, soft_wrap=True)


def _table(runs: Sequence[RunResult]) -> object:
    from rich.table import Table

    table = Table(
        "", "adapters", "requests", "errors", "tokens/s", "TTFT p50", "p99", "ITL p50", "p99", "SLO met", "Jain"
    )
    for column in table.columns[1:]:
        column.justify = "right"
    table.add_column("memory", justify="right")
    for run in runs:
        summary = run.summary
        table.add_row(
            summary.label,
            str(run.num_adapters),
            str(summary.requests),
            str(sum(summary.errors.values())),
            f"{summary.tokens_per_s:.1f}",
            f"{summary.ttft_s.p50:.2f} s",
            f"{summary.ttft_s.p99:.2f} s",
            f"{1000 * summary.itl_s.p50:.0f} ms",
            f"{1000 * summary.itl_s.p99:.0f} ms",
            f"{summary.goodput_share:.0%}",
            f"{summary.fairness.jain:.3f}",
            "" if run.memory_bytes is None else human_bytes(run.memory_bytes),
        )
    return table


def _tenants(overload: Overload) -> object:
    from rich.table import Table

    table = Table("tenant", "requests", "in time", "late", "refused", "past deadline", "TTFT p50", "p99", "served/s")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, tenant in overload.tenants.items():
        table.add_row(
            name,
            str(tenant.requests),
            str(tenant.in_time),
            str(tenant.late),
            str(sum(tenant.refused.values())),
            str(tenant.deadline_exceeded),
            f"{tenant.ttft_s.p50:.2f} s",
            f"{tenant.ttft_s.p99:.2f} s",
            f"{tenant.served_per_s:.0f}",
        )
    return table
