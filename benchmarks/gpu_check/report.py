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
    console.print(
        table("steps", result["cases"], ("shape", "adapters", "r", "k", "rows", "step_ms", "floor_ms", "times_floor")),
        table("prefill", result["prefill"], ("shape", "adapters", "tokens", "ms", "floor_ms", "times_floor")),
        table("attention, one row", result["attention"], ("context", "ms", "floor_ms", "share_of_bandwidth")),
        table("transformers", result["transformers"], ("shape", "rows", "step_ms")),
    )


def table(title: str, lines: Sequence[Line], columns: Sequence[str]) -> Table:
    """One row a line; what a line does not have is left empty."""
    made = Table(*columns, title=title, title_justify="left")
    for line in lines:
        made.add_row(*("" if line.get(column) is None else str(line[column]) for column in columns))
    return made
