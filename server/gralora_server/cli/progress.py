"""How what takes long is shown: a start, the preparation of the model, a load test. Knows nothing of what they do."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Protocol

from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn

from gralora_kernels.stages import StartStage, Tell
from gralora_server.cli.output import stderr

BEAT_S = 1.0  # what is silent for twice as long seems to hang


def showing(say: Callable[[str], None] | None = None) -> AbstractContextManager[StartStage]:
    """Stages on standard error: with a bar each, or, where that is no terminal, by lines to `say`. None: printed."""
    return _bars() if stderr().is_terminal else _lines(say or _print_line)


@contextmanager
def stages() -> Iterator[Callable[[str, int, int | None], None]]:
    """For work whose stages follow one another: each ends where the next is named."""
    with showing() as stage, ExitStack() as current:
        tells: dict[str, Tell] = {}

        def report(name: str, done: int, total: int | None) -> None:
            if name not in tells:
                current.close()
                tells[name] = current.enter_context(stage(name))
            tells[name](done=done, total=total)

        yield report


@contextmanager
def _bars() -> Iterator[StartStage]:
    columns = (
        SpinnerColumn(finished_text="✓"),
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[words]}"),
    )
    with Progress(*columns, console=stderr()) as progress:

        @contextmanager
        def stage(name: str) -> Iterator[Tell]:
            task = progress.add_task(name, total=None, words="")

            def tell(words: str = "", *, done: int = 0, total: int | None = None) -> None:
                progress.update(task, completed=done, total=total, words=words)

            yield tell
            progress.update(task, total=1, completed=1)

        yield stage


class _Lines:
    """A line when a stage has ended, with its time; meanwhile one a second, so that nobody takes it for stuck."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._said_s = time.monotonic()
        self._running: dict[str, tuple[float, str]] = {}  # since when, and what was told of it
        self._lock = threading.Lock()

    @contextmanager
    def stage(self, name: str) -> Iterator[Tell]:
        begun_s = time.monotonic()

        def tell(words: str = "", *, done: int = 0, total: int | None = None) -> None:
            words = words or (f"{done} of {total}" if total else "")
            with self._lock:
                self._running[name] = begun_s, words

        tell()
        try:
            yield tell
        except BaseException:
            with self._lock:
                del self._running[name]
            raise
        with self._lock:
            _, words = self._running.pop(name)
            self._tell_of(name, words, f"{time.monotonic() - begun_s:.1f} s")

    def beat(self) -> None:
        """To be called all the time: a line if there was none for long."""
        now_s = time.monotonic()
        with self._lock:
            if now_s - self._said_s >= BEAT_S:
                for name, (begun_s, words) in self._running.items():
                    self._tell_of(name, words, f"{now_s - begun_s:.0f} s so far")

    def _tell_of(self, name: str, *facts: str) -> None:
        self._said_s = time.monotonic()
        self._say(f"{name}: {', '.join(filter(None, facts))}")


@contextmanager
def _lines(say: Callable[[str], None]) -> Iterator[StartStage]:
    lines, ended = _Lines(say), threading.Event()

    def beat() -> None:
        while not ended.wait(BEAT_S / 4):
            lines.beat()

    beating = threading.Thread(target=beat, name="stages", daemon=True)
    beating.start()
    try:
        yield lines.stage
    finally:
        ended.set()
        beating.join()


def _print_line(line: str) -> None:
    stderr().print(line, markup=False, soft_wrap=True)


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
