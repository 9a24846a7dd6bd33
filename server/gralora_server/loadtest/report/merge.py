"""Several results to one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from gralora_server.loadtest.result import LoadTestResult, RunResult


def merge(results: Sequence[LoadTestResult]) -> LoadTestResult:
    """One comparison. Labels that occur twice are numbered; of what differs, all values are said, and of different
    machines a note. `results` are one or more.
    """
    runs = [run for result in results for run in result.runs]
    return LoadTestResult(
        title="Load test, comparison",
        made_at=max(result.made_at for result in results),
        machine=_joined([result.machine for result in results]),
        workload=_joined([result.workload for result in results]),
        runs=tuple(_distinct(runs)),
        refusals=tuple(refusal for result in results for refusal in result.refusals),
        notes=tuple(dict.fromkeys([*(note for result in results for note in result.notes), *_machines_note(results)])),
    )


def _distinct(runs: Sequence[RunResult]) -> list[RunResult]:
    count, seen, renamed = Counter(run.summary.label for run in runs), Counter[str](), []
    for run in runs:
        label = run.summary.label
        seen[label] += 1
        if count[label] > 1:
            label = f"{label} ({seen[label]})"
        renamed.append(run.model_copy(update={"summary": run.summary.model_copy(update={"label": label})}))
    return renamed


def _machines_note(results: Sequence[LoadTestResult]) -> list[str]:
    machines = [result.machine for result in results]
    differing = {name for name in _joined(machines) if len({one.get(name) for one in machines}) > 1}
    if not differing:
        return []
    said = "; ".join(f"{name}: {value}" for name, value in _joined(machines).items() if name in differing)
    return [f"The runs are not of one machine ({said}): what differs between them may be the machine's doing."]


def _joined(facts: Sequence[Mapping[str, str]]) -> dict[str, str]:
    names = dict.fromkeys(name for one in facts for name in one)
    return {name: " / ".join(dict.fromkeys(one.get(name, "not said") for one in facts)) for name in names}
