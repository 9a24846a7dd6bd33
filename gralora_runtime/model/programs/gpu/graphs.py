"""Decode steps captured once, for some numbers of rows, and replayed. Knows no model: it captures what it is given."""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

Kind = TypeVar("Kind", bound=Hashable)
Replay = Callable[[], Tensor]  # computes anew what was captured, and returns where the result lies


class Capture(Protocol):
    """Makes of a computation on tensors that stay where they are something that repeats it."""

    def __call__(self, compute: Callable[[], Tensor], /) -> Replay: ...


def repeated(compute: Callable[[], Tensor], /) -> Replay:
    """A `Capture` where there are no graphs: simply computes again, launch by launch."""
    return compute


class CudaCapture:
    """CUDA graphs in one pool of memory. Begin with the largest: the others then find room in what it leaves behind."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __call__(self, compute: Callable[[], Tensor], /) -> Replay:
        compute()  # what has to be compiled, and libraries' own first allocations, cannot be captured
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        # Other threads load adapters meanwhile, and may allocate and copy.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            result = compute()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay


def usual_ladder(max_rows: int) -> tuple[int, ...]:
    """Numbers of rows worth a graph: few rows are padded up to less than twice as many, many by about an eighth."""
    rungs = {1, 2, 4, *range(8, 65, 8), *range(80, 257, 16), *range(288, 1025, 32), max_rows}
    return tuple(sorted(rows for rows in rungs if rows <= max_rows))


class GraphLadder(Generic[Kind]):
    """A graph for each number of rows and kind of step. `seconds`: what capturing took."""

    def __init__(
        self,
        rungs: Sequence[int],
        kinds: Sequence[Kind],
        capture: Capture,
        compute: Callable[[int, Kind], Callable[[], Tensor]],
    ) -> None:
        """`compute(rows, kind)` is what computes a step of so many rows, on tensors that stay where they are."""
        self.rungs = tuple(sorted(rungs))
        started_s = time.perf_counter()
        logger.info("capturing decode steps of %s rows", ", ".join(map(str, self.rungs)))
        self._graphs = {(rows, kind): capture(compute(rows, kind)) for rows in reversed(self.rungs) for kind in kinds}
        self.seconds = time.perf_counter() - started_s
        logger.info("captured %d decode steps in %.1f s", len(self), self.seconds)

    def __len__(self) -> int:
        return len(self._graphs)

    def rung(self, rows: int) -> int | None:
        """The least number of rows that a graph was captured for and that is enough; None if there is none."""
        place = bisect_left(self.rungs, rows)
        return self.rungs[place] if place < len(self.rungs) else None

    def replay(self, rows: int, kind: Kind) -> Tensor:
        """Logits of a rung's step, [rows, vocab]. They lie where the next replay writes its own."""
        return self._graphs[rows, kind]()
