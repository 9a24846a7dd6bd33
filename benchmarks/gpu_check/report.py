"""A result on one screen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

Line = dict[str, Any]


def print_result(result: Line) -> None:
    """What failed, then the times."""
    console = Console(width=120)
    machine = result["machine"]
    console.print(
        f"{machine.get('gpu', 'no GPU')}, torch {machine.get('torch')}, triton {machine.get('triton')}: reads "
        f"{machine.get('read_gb_s')} GB/s, {machine.get('product_tflop_s')} TFLOP/s, "
        f"{machine.get('launch_us')} us a launch"
        + (" [bold]dry run: times mean nothing[/bold]" if result["dry"] else "")
    )
    failed = [check for check in result["checks"] if not check["passed"]]
    console.print(f"{len(result['checks']) - len(failed)} of {len(result['checks'])} checks passed")
    for check in failed:
        console.print(Text("FAILED", "red"), Text(f"{check['name']}: {check['detail']}"))
    for line in result["skipped"]:
        console.print(f"skipped {line['shape']}: {line['reason']}")
    console.print(steps(result["cases"]))
    console.print("step_ms (times its floor); all figures and the host's part of each are in the file")
    console.print(
        table("prefill", result["prefill"], ("shape", "adapters", "tokens", "ms", "floor_ms", "times_floor")),
        table("served", result["served"], ("way", "streams", "step_ms", "tokens_per_s", "busy_share")),
        table("attention, one row", result["attention"], ("context", "ms", "share_of_bandwidth", "torch_ms")),
        table("transformers", result["transformers"], ("shape", "rows", "step_ms")),
    )
    for shape, line in result["graphs"].items():
        console.print(
            f"{shape}: ready after {line['start_to_ready_s']} s, of which {line['graphs']} graphs {line['capture_s']} s"
        )
    if result["loads"]:
        loads = result["loads"]
        console.print(f"{loads['shape']}: an adapter loads in {loads['phases_ms']['request to resident']} ms")


def steps(cases: Sequence[Line]) -> Table:
    """One row a shape and kind, one column a number of rows, so that it fits a screen."""
    counts = sorted({case["rows"] for case in cases})
    made = Table("shape", "adapters", "r", "k", *(f"{count} rows" for count in counts), title="steps")
    kinds: dict[tuple[object, ...], dict[int, str]] = {}
    for case in cases:
        found = kinds.setdefault(tuple(case[name] for name in ("shape", "adapters", "r", "k")), {})
        found[case["rows"]] = f"{case['step_ms']} ({case['times_floor']})"
    for kind, found in kinds.items():
        made.add_row(*("" if name is None else str(name) for name in kind), *(found.get(count, "") for count in counts))
    return made


def table(title: str, lines: Sequence[Line], columns: Sequence[str]) -> Table:
    """One row a line; what a line does not have is left empty."""
    made = Table(*columns, title=title, title_justify="left")
    for line in lines:
        made.add_row(*("" if line.get(column) is None else str(line[column]) for column in columns))
    return made
