"""How the preparation of the model is shown. Knows nothing of what is prepared."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn

from gralora_server.cli.output import stderr


@contextmanager
def stages() -> Iterator[Callable[[str, int, int | None], None]]:
    """A line per stage on standard error; where that is no terminal, one plain line when a stage begins."""
    console = stderr()
    if not console.is_terminal:
        yield _plain_lines()
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        tasks: dict[str, TaskID] = {}

        def report(stage: str, done: int, total: int | None) -> None:
            if stage not in tasks:
                for begun in tasks.values():
                    progress.update(begun, total=1, completed=1)
                tasks[stage] = progress.add_task(stage, total=None)
            progress.update(tasks[stage], completed=done, total=total)

        yield report
        for begun in tasks.values():
            progress.update(begun, total=1, completed=1)


def _plain_lines() -> Callable[[str, int, int | None], None]:
    begun: set[str] = set()

    def report(stage: str, _done: int, _total: int | None) -> None:
        if stage not in begun:
            begun.add(stage)
            stderr().print(f"{stage} ...", markup=False)

    return report
