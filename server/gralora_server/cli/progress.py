"""How what takes long is shown: the preparation of the model, and a load test. Knows nothing of what they do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

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


class Counts(Protocol):
    """What a load test has done so far."""

    at_s: float
    ended: int
    failed: int
    tokens: int

    @property
    def in_flight(self) -> int: ...


@contextmanager
def running(what: str, duration_s: float) -> Iterator[Callable[[Counts], None]]:
    """A bar over the run's time, with its counts; nothing where standard error is no terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("{task.fields[counts]}"))
    with Progress(*columns, console=stderr(), disable=not stderr().is_terminal, transient=True) as progress:
        task = progress.add_task(what, total=duration_s, counts="")

        def report(counts: Counts) -> None:
            rate = counts.tokens / max(counts.at_s, 1.0)
            text = f"{counts.ended} answered, {counts.in_flight} running, {counts.failed} failed, {rate:.0f} tokens/s"
            progress.update(task, completed=counts.at_s, counts=text)

        yield report


def _plain_lines() -> Callable[[str, int, int | None], None]:
    begun: set[str] = set()

    def report(stage: str, _done: int, _total: int | None) -> None:
        if stage not in begun:
            begun.add(stage)
            stderr().print(f"{stage} ...", markup=False)

    return report
