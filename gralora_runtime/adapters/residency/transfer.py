"""Moves weights and table rows between host memory and where kernels read them. Knows no adapter, and no books.

On the CPU that is plain copying, at a pace that leaves the cores to the steps that run. A GPU has a stream of its own
for it, for which no step waits. Either way, what was asked for inside a `moving` block is done, in that order, when the
block is left.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from gralora_kernels.packing import Array
from gralora_kernels.tables import TableSet
from gralora_runtime.adapters.residency.pace import Pace, no_step_runs

Item = TypeVar("Item")
Result = TypeVar("Result")

# Torch works on fewer elements than this in the calling thread alone.
SERIAL_NUMEL = 32_000
# Page-locked once, at start, because that takes longer than a load may. More is locked for an adapter that needs it.
STAGING_BYTES = 128 << 20
STAGING_ALIGNMENT = 64  # bytes: a cache line, and a multiple of every element's size
COPY_BYTES = 4 << 20  # of one thread's piece of a copy within host memory
PIECE_BYTES = 1 << 20  # the same, where the cores have steps to compute: a tenth of a millisecond, or two
MAX_HELPERS = 8  # threads: SHA-256 of 84 MB takes one of them 50 to 70 ms


class Spread(Protocol):
    """Who works on the host: results in the order of items. The first error is raised when all work has ended."""

    def __call__(self, work: Callable[[Item], Result], items: Sequence[Item], /) -> list[Result]: ...


class Transfer(Protocol):
    """All but `spread` and `is_busy` belongs into a `moving` block."""

    @property
    def spread(self) -> Spread:
        """As many threads as serving on this device leaves to loading."""

    @property
    def is_busy(self) -> bool:
        """Whether steps run on the cores that this works on. It may be of a moment ago."""

    def moving(self, *, after_steps: bool = False) -> AbstractContextManager[None]:
        """`after_steps`: what steps launched until now may read stays as it is until they have ended. A lease that was
        given back says that nobody will begin to read, not that the last step is over."""

    def upload(self, target: Tensor, source: Tensor) -> None:
        """Flat `source`, in host memory, to flat `target` of the same dtype on the device."""

    def write_rows(self, tables: TableSet, slot: int) -> None:
        """Make the device's rows of a slot, in all modules, what they are in host memory."""

    def zero(self, target: Tensor) -> None:
        """Flat `target`, on the device."""

    def download(self, source: Tensor) -> Tensor:
        """A copy of flat `source` in host memory; it may be used at once."""


def serially(work: Callable[[Item], Result], items: Sequence[Item], /) -> list[Result]:
    """A `Spread` over no other thread than the caller's."""
    return [work(item) for item in items]


def serial_pieces(flat: Tensor) -> Sequence[Tensor]:
    """Views of a flat tensor, each of which torch works on in the calling thread alone."""
    pieces: Sequence[Tensor] = flat.split(SERIAL_NUMEL)  # type: ignore[no-untyped-call]
    return pieces


def host_memory(numel: int, dtype: torch.dtype) -> Tensor:
    """Flat and not yet written. Numpy, unlike torch, asks for large pages where the system has them."""
    return torch.from_numpy(np.empty(numel * dtype.itemsize, np.uint8)).view(dtype)


def no_steps() -> None:
    """For whoever computes none, or none that has not ended when it returns."""


def transfer_to(
    device: torch.device, wait_for_steps: Callable[[], None] = no_steps, pace: Pace | None = None
) -> Transfer:
    """The one way in which a device is filled. `wait_for_steps` returns when those that are on their way have ended.

    `pace`: where steps run on the host's cores.
    """
    if device.type == "cpu":
        return HostTransfer(wait_for_steps, pace or Pace())
    return DeviceTransfer(CudaQueue(device))


class _Shared(Generic[Item, Result]):
    """Work that several threads take from one another, an item at a time. An error ends it for all of them."""

    def __init__(self, work: Callable[[Item], Result], items: Sequence[Item]) -> None:
        self._work = work
        self._results: list[Any] = [None] * len(items)
        self._left = iter(enumerate(items))  # the interpreter lock sees to it that an item is taken once
        self._errors: list[BaseException] = []

    def do_some(self, until: Callable[[], bool] = no_step_runs) -> None:
        """`until` is asked before each."""
        while not (self._errors or until()) and (taken := next(self._left, None)) is not None:
            position, item = taken
            try:
                self._results[position] = self._work(item)
            except BaseException as error:
                self._errors.append(error)

    def results(self) -> list[Result]:
        """When nobody works any more."""
        if self._errors:
            raise self._errors[0]
        return self._results


class HostTransfer:
    """Works in pieces, in the calling thread and, while no step runs and there is another core, in one that helps.

    While steps run there is a pause after each piece, and no help: a step would wait for both cores.
    """

    def __init__(self, wait_for_steps: Callable[[], None], pace: Pace) -> None:
        self._wait_for_steps = wait_for_steps
        self._pace = pace
        self._helper = ThreadPoolExecutor(1, thread_name_prefix="adapter-helper") if pace.cores > 1 else None

    def spread(self, work: Callable[[Item], Result], items: Sequence[Item], /) -> list[Result]:
        shared = _Shared(partial(self._pace.keep, work), items)
        helping = None
        if self._helper is not None and len(items) > 1 and not self._pace.steps_run():
            helping = self._helper.submit(shared.do_some, self._pace.steps_run)
        shared.do_some()
        if helping is not None and not helping.cancel():
            wait([helping])
        return shared.results()

    @property
    def is_busy(self) -> bool:
        return self._pace.steps_run()

    def moving(self, *, after_steps: bool = False) -> AbstractContextManager[None]:
        if after_steps:
            self._wait_for_steps()
        return nullcontext()

    def upload(self, target: Tensor, source: Tensor) -> None:
        to, of = _bytes(target), _bytes(source)

        def copy(start: int) -> None:
            np.copyto(to[start : start + PIECE_BYTES], of[start : start + PIECE_BYTES])

        self.spread(copy, range(0, len(to), PIECE_BYTES))

    def write_rows(self, tables: TableSet, slot: int) -> None:
        """Kernels read the rows in host memory."""

    def zero(self, target: Tensor) -> None:
        to = _bytes(target)
        self.spread(lambda start: to[start : start + PIECE_BYTES].fill(0), range(0, len(to), PIECE_BYTES))

    def download(self, source: Tensor) -> Tensor:
        copy = host_memory(source.numel(), source.dtype)
        self.upload(copy, source)
        return copy


def _bytes(flat: Tensor) -> Array:
    """uint8, the same memory. Numpy copies in the calling thread alone; torch would start a team of threads."""
    array: Array = flat.view(torch.uint8).numpy()
    return array


class Queue(Protocol):
    """A stream of a device: does things in order and later, beside the steps."""

    def pinned(self, num_bytes: int) -> Tensor:
        """uint8 [num_bytes] of host memory that the device can reach by itself."""

    def copy(self, target: Tensor, source: Tensor) -> None: ...

    def zero(self, target: Tensor) -> None: ...

    def follow_steps(self) -> None:
        """What comes now happens after all steps that were launched until now."""

    def wait(self) -> None:
        """The calling thread sleeps until everything so far is done."""


class CudaQueue:
    """`steps` is the stream of the steps; it never waits for this one."""

    def __init__(self, device: torch.device, steps: torch.cuda.Stream | None = None) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._steps = steps or torch.cuda.default_stream(device)
        self._done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        self.follow_steps()  # which have zeroed the arena

    def pinned(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def copy(self, target: Tensor, source: Tensor) -> None:
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)

    def zero(self, target: Tensor) -> None:
        with torch.cuda.stream(self._stream):
            target.zero_()

    def follow_steps(self) -> None:
        self._stream.wait_stream(self._steps)

    def wait(self) -> None:
        self._done.record(self._stream)
        self._done.synchronize()


class DeviceTransfer:
    """Everything passes through one staging area of pinned memory, so one thread moves at a time."""

    def __init__(self, queue: Queue, *, staging_bytes: int = STAGING_BYTES) -> None:
        self._queue = queue
        self._lock = threading.Lock()
        self._staging = queue.pinned(staging_bytes)
        self._staged = 0  # bytes taken since the last wait
        helpers = min(MAX_HELPERS, max(1, len(os.sched_getaffinity(0)) // 2))
        self._helpers = ThreadPoolExecutor(helpers, thread_name_prefix="adapter-helper")

    def spread(self, work: Callable[[Item], Result], items: Sequence[Item], /) -> list[Result]:
        futures = [self._helpers.submit(work, item) for item in items]
        wait(futures)
        return [future.result() for future in futures]

    @property
    def is_busy(self) -> bool:
        return False

    @contextmanager
    def moving(self, *, after_steps: bool = False) -> Iterator[None]:
        with self._lock:
            try:
                if after_steps:
                    self._queue.follow_steps()
                yield
            finally:
                self._wait()

    def upload(self, target: Tensor, source: Tensor) -> None:
        staged = self._stage(source.numel(), source.dtype)
        self._copy_on_host(staged, source)
        self._queue.copy(target, staged)

    def write_rows(self, tables: TableSet, slot: int) -> None:
        """One write for the index, one for the scale and one for what says where gains are."""
        rows = tables.rows
        pairs = (rows.index, rows.host_index), (rows.scale, rows.host_scale), (rows.affine, rows.host_affine)
        for target, host in pairs:
            here = torch.from_numpy(host[:, slot])  # [modules, ENTRIES, 4], [modules, ENTRIES], [modules]
            staged = self._stage(here.numel(), here.dtype).view(here.shape)
            staged.copy_(here)
            self._queue.copy(target[:, slot], staged)

    def zero(self, target: Tensor) -> None:
        self._queue.zero(target)

    def download(self, source: Tensor) -> Tensor:
        staged = self._stage(source.numel(), source.dtype)
        self._queue.copy(staged, source)
        self._wait()
        copy = host_memory(source.numel(), source.dtype)
        self._copy_on_host(copy, staged)
        return copy

    def _stage(self, numel: int, dtype: torch.dtype) -> Tensor:
        """So much of the staging area, until the next wait. An area that is too small is left to torch, which keeps it
        until the device has read what was in it; the next one has room for all of that too."""
        num_bytes = numel * dtype.itemsize
        end = self._staged + num_bytes
        if end > self._staging.numel():
            self._staging = self._queue.pinned(1 << (end - 1).bit_length())
        taken = self._staging[self._staged : end]
        self._staged = -(-end // STAGING_ALIGNMENT) * STAGING_ALIGNMENT
        return taken.view(dtype)

    def _wait(self) -> None:
        self._queue.wait()
        self._staged = 0

    def _copy_on_host(self, target: Tensor, source: Tensor) -> None:
        to, of = _bytes(target), _bytes(source)

        def copy(start: int) -> None:
            np.copyto(to[start : start + COPY_BYTES], of[start : start + COPY_BYTES])

        self.spread(copy, range(0, len(to), COPY_BYTES))
