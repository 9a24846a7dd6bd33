"""What a GPU is asked to do for one adapter, in which order, and that nobody is told before it has been done.

No GPU is needed: `SlowQueue` is one that does nothing until somebody waits for it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from adapters.harness import lease, managing, weights, write_units
from support.checkpoints import MODULES, write_gralora, write_lora
from torch import Tensor

from gralora_kernels.tables import TableSet
from gralora_runtime.adapters.checkpoint import loader
from gralora_runtime.adapters.checkpoint.loader import LoadedAdapter, load
from gralora_runtime.adapters.residency import transfer
from gralora_runtime.adapters.residency.pace import Pace
from gralora_runtime.adapters.residency.pool import AdapterPool, Resident
from gralora_runtime.adapters.residency.transfer import DeviceTransfer, HostTransfer, serially, transfer_to

CPU = torch.device("cpu")
WAIT_S = 20.0


class SlowQueue:
    """Notes what it is asked for, and does it as late as it may."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.names: dict[int, str] = {}  # of what a device would hold, by address
        self.pinned_bytes: list[int] = []
        self.waiting: list[threading.Thread] = []
        self._todo: list[Callable[[], object]] = []

    def pinned(self, num_bytes: int) -> Tensor:
        self.pinned_bytes.append(num_bytes)
        return torch.full((num_bytes,), 0xA5, dtype=torch.uint8)

    def copy(self, target: Tensor, source: Tensor) -> None:
        self._ask(f"copy to {self._name(target)}", lambda: target.copy_(source))

    def zero(self, target: Tensor) -> None:
        self._ask(f"zero {self._name(target)}", target.zero_)

    def follow_steps(self) -> None:
        self.log.append("follow steps")

    def wait(self) -> None:
        self.log.append("wait")
        self.waiting.append(threading.current_thread())
        todo, self._todo = self._todo, []
        for do in todo:
            do()

    def _ask(self, what: str, do: Callable[[], object]) -> None:
        self.log.append(what)
        self._todo.append(do)

    def _name(self, target: Tensor) -> str:
        return self.names.get(target.untyped_storage().data_ptr(), "staging")


class Device:
    """A pool behind a slow queue, whose tables are, as on a GPU, not the memory of their host copies."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, staging_bytes: int = 1 << 20, **options: int) -> None:
        self.queue = SlowQueue()
        self.transfer = DeviceTransfer(self.queue, staging_bytes=staging_bytes)
        settings = {"pool_bytes": 1 << 20, "max_slots": 3} | options
        with monkeypatch.context() as patch:
            patch.setattr(torch, "from_numpy", torch.tensor)
            self.pool = AdapterPool(
                modules=MODULES, device=CPU, dtype=torch.float32, transfer=self.transfer, **settings
            )
        rows = self.pool.table_set.rows
        tables = {"weights": self.pool.arena, "index": rows.index, "scale": rows.scale, "affine": rows.affine}
        for name, held in tables.items():
            self.queue.names[held.untyped_storage().data_ptr()] = name

    def took(self) -> list[str]:
        """What was asked for since the last time."""
        log, self.queue.log = self.queue.log, []
        return log

    def rows(self, slot: int) -> tuple[Tensor, Tensor]:
        rows = self.pool.table_set.rows
        return rows.index[:, slot], rows.scale[:, slot]

    def weights(self, resident: Resident) -> Tensor:
        return self.pool.arena[resident.offset :][: resident.layout.numel]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[LoadedAdapter]:
    root = tmp_path_factory.mktemp("adapters")
    paths = [
        write_gralora(root / "a", r=8, k=2),
        write_gralora(root / "b", r=4, k=4, hybrid_r=2),
        write_lora(root / "c"),
    ]
    return [load(path.name, path, MODULES, torch.float32, max_width=64) for path in paths]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    return Device(monkeypatch)


def place(device: Device, adapter: LoadedAdapter) -> Resident:
    resident = device.pool.place(adapter)
    assert resident is not None
    device.took()
    return resident


def test_an_adapter_is_one_copy_of_weights_then_one_of_each_table_then_a_wait(
    device: Device, adapters: list[LoadedAdapter]
) -> None:
    resident = device.pool.reserve(adapters[0].layout, 0)

    device.pool.fill(resident, adapters[0])

    assert device.took() == ["copy to weights", "copy to index", "copy to scale", "copy to affine", "wait"]


def test_the_device_has_everything_before_fill_returns(device: Device, adapters: list[LoadedAdapter]) -> None:
    for adapter in adapters:
        resident = device.pool.reserve(adapter.layout, device.pool.ranges.find(adapter.layout.numel) or 0)
        device.pool.fill(resident, adapter)

        assert torch.equal(adapter.blob, device.weights(resident))
        on_host = device.pool.table_set.rows
        index, scale = device.rows(resident.slot)
        assert on_host.host_index[:, resident.slot].tolist() == index.tolist()
        assert on_host.host_scale[:, resident.slot].tolist() == scale.tolist()
        assert index.any()


def test_nobody_finds_an_adapter_that_is_still_on_its_way(
    device: Device, adapters: list[LoadedAdapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The queue does nothing until it is waited for: then the pool must not know the adapter yet."""
    wait, seen = device.queue.wait, []

    def look_and_wait() -> None:
        seen.append(
            (device.pool.find(adapters[0].digest), bool(device.pool.arena.any()), bool(device.rows(0)[0].any()))
        )
        wait()

    monkeypatch.setattr(device.queue, "wait", look_and_wait)
    resident = device.pool.place(adapters[0])

    assert seen == [(None, False, False)]
    assert device.pool.find(adapters[0].digest) is resident


def test_clearing_follows_the_steps_then_takes_the_rows_then_the_weights(
    device: Device, adapters: list[LoadedAdapter]
) -> None:
    """A step that was aborted may still read when its lease is back: what it writes may be kept for others."""
    resident = place(device, adapters[1])

    device.pool.clear(resident)

    assert device.took() == ["follow steps", "copy to index", "copy to scale", "copy to affine", "zero weights", "wait"]
    assert not device.pool.arena.any()
    assert not any(rows.any() for rows in device.rows(resident.slot))


def test_a_slot_s_neighbours_keep_their_rows(device: Device, adapters: list[LoadedAdapter]) -> None:
    residents = [place(device, adapter) for adapter in adapters]
    before = [[rows.clone() for rows in device.rows(resident.slot)] for resident in residents]

    device.pool.evict(residents[1])

    for resident, (index, scale) in zip(residents[::2], before[::2], strict=True):
        assert torch.equal(index, device.rows(resident.slot)[0])
        assert torch.equal(scale, device.rows(resident.slot)[1])


def test_reading_back_waits_and_the_copy_is_its_own(device: Device, adapters: list[LoadedAdapter]) -> None:
    first, second = (place(device, adapter) for adapter in adapters[:2])

    copy = device.pool.read(first)
    assert device.took()[:2] == ["copy to staging", "wait"]
    device.pool.read(second)

    assert torch.equal(adapters[0].blob, copy.blob)
    assert copy.layout is adapters[0].layout


def test_an_adapter_larger_than_the_staging_area_makes_it_grow_once(
    monkeypatch: pytest.MonkeyPatch, adapters: list[LoadedAdapter]
) -> None:
    device = Device(monkeypatch, staging_bytes=adapters[0].num_bytes)
    for _ in range(3):
        resident = place(device, adapters[0])
        assert torch.equal(adapters[0].blob, device.weights(resident))
        assert device.rows(resident.slot)[0].any()
        device.pool.evict(resident)

    assert len(device.queue.pinned_bytes) == 2
    assert device.queue.pinned_bytes[1] > adapters[0].num_bytes


def test_weights_of_many_pieces_arrive_whole(monkeypatch: pytest.MonkeyPatch, adapters: list[LoadedAdapter]) -> None:
    monkeypatch.setattr(transfer, "COPY_BYTES", 1000)
    device = Device(monkeypatch)

    resident = place(device, adapters[0])

    assert torch.equal(adapters[0].blob, device.weights(resident))
    assert torch.equal(adapters[0].blob, device.pool.read(resident).blob)


def test_one_thread_moves_at_a_time_and_waits_itself(device: Device, adapters: list[LoadedAdapter]) -> None:
    """The placer fills while whoever unloads a name clears: the staging area is only one of theirs at a time."""
    residents = [place(device, adapter) for adapter in adapters[:2]]
    device.queue.waiting.clear()
    threads = [threading.Thread(target=device.pool.evict, args=(resident,)) for resident in residents]
    with device.transfer.moving():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(0.05)
        assert device.took() == []
    for thread in threads:
        thread.join(WAIT_S)

    once = ["follow steps", "copy to index", "copy to scale", "copy to affine", "zero weights", "wait"]
    assert ["wait", *once, *once] == device.took()
    assert {*threads, threading.current_thread()} == set(device.queue.waiting)
    assert not device.pool.arena.any()


def test_what_fails_half_way_still_waits(device: Device, adapters: list[LoadedAdapter]) -> None:
    """Or the next adapter would be staged over one that is being copied."""

    def fail_inside() -> None:
        with device.transfer.moving():
            device.transfer.upload(device.pool.arena[: adapters[0].layout.numel], adapters[0].blob)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_inside()

    assert device.took() == ["copy to weights", "wait"]


def test_helpers_answer_in_order_and_raise_what_was_raised(device: Device) -> None:
    for spread in (serially, device.transfer.spread):
        assert spread(lambda x: x * x, [2, 1, 0]) == [4, 1, 0]
        with pytest.raises(ZeroDivisionError):
            spread(lambda x: 1 // x, [1, 0])


def test_an_error_is_raised_when_nobody_works_any_more(device: Device) -> None:
    """What the others work on, a file that is open, may be gone right after."""
    device.transfer._helpers = ThreadPoolExecutor(2)
    slow_one_ended = []

    def work(delay_s: float) -> None:
        time.sleep(delay_s)
        slow_one_ended.append(1 / delay_s)

    with pytest.raises(ZeroDivisionError):
        device.transfer.spread(work, [0, 0.1])

    assert slow_one_ended == [10]


def test_a_manager_loads_evicts_and_erases_through_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Helpers pack, and what requests get is what was loaded."""
    write_units(tmp_path, ["a", "b", "c"])
    packers: list[str] = []
    place_b = loader.place_b

    def noting(*args: object) -> None:
        packers.append(threading.current_thread().name)
        place_b(*args)

    monkeypatch.setattr(loader, "place_b", noting)
    with managing(tmp_path, units=2, host_units=4) as manager:
        manager.pool.transfer = DeviceTransfer(SlowQueue())
        for name in ("a", "b", "c", "a", "c", "b"):
            held = lease(manager, name)
            expected = load(name, tmp_path / name, MODULES, torch.float32, max_width=64)
            assert torch.equal(expected.blob, weights(manager, held))
            manager.release(held)
        for name in ("a", "b", "c"):
            manager.unload(name)
        assert not manager.pool.arena.any()
        assert manager.stats().evictions > 0
    assert any(name.startswith("adapter-helper") for name in packers)


@pytest.mark.parametrize("steps_run", [True, False])
def test_on_the_cpu_everything_is_moved_whether_steps_run_or_not(steps_run: bool) -> None:
    host = transfer_to(CPU, pace=Pace(share=0.5, steps_run=lambda: steps_run))
    assert isinstance(host, HostTransfer)
    source = torch.arange(1_000_000, dtype=torch.float32)
    target = torch.zeros_like(source)

    with host.moving():
        host.upload(target, source)
        copy = host.download(target)
        host.zero(target)

    assert torch.equal(source, copy)
    assert not target.any()


def test_on_the_cpu_one_thread_works_and_an_error_ends_it() -> None:
    done: list[int] = []

    def work(item: int) -> int:
        done.append(item)
        if item == 3:
            raise IndexError("three")
        return threading.get_ident()

    host = transfer_to(CPU)
    assert set(host.spread(work, range(3))) == {threading.get_ident()}
    with pytest.raises(IndexError, match="three"):
        host.spread(work, range(9))
    assert done == [0, 1, 2, 0, 1, 2, 3]


def test_on_the_cpu_another_thread_helps_while_no_step_runs() -> None:
    together = threading.Barrier(2)  # which one thread alone does not pass

    def work(item: int) -> tuple[int, int]:
        together.wait(WAIT_S)
        return item, threading.get_ident()

    results = transfer_to(CPU, pace=Pace(cores=2)).spread(work, range(10))

    assert [item for item, _ in results] == list(range(10))
    assert len({thread for _, thread in results}) == 2
    assert threading.get_ident() in {thread for _, thread in results}


def test_on_the_cpu_nobody_helps_while_steps_run() -> None:
    host = transfer_to(CPU, pace=Pace(cores=2, steps_run=lambda: True))

    assert set(host.spread(lambda _: threading.get_ident(), range(10))) == {threading.get_ident()}


def test_help_ends_with_the_piece_during_which_a_step_begins() -> None:
    together, steps_run = threading.Barrier(2), False

    def work(item: int) -> int:
        nonlocal steps_run
        if item < 2:
            together.wait(WAIT_S)
            steps_run = True
            together.wait(WAIT_S)
        return threading.get_ident()

    results = transfer_to(CPU, pace=Pace(cores=2, steps_run=lambda: steps_run)).spread(work, range(10))

    assert len(set(results[:2])) == 2
    assert set(results[2:]) == {threading.get_ident()}


@pytest.mark.parametrize("fails_in_helper", [True, False])
def test_an_error_ends_it_for_all_and_is_told_when_nobody_works_any_more(fails_in_helper: bool) -> None:
    together, ended = threading.Barrier(2), []

    def work(item: int) -> None:
        together.wait(WAIT_S)
        if (threading.current_thread() is not caller) == fails_in_helper:
            raise IndexError(item)
        ended.append(item)

    caller = threading.current_thread()
    with pytest.raises(IndexError):
        transfer_to(CPU, pace=Pace(cores=2)).spread(work, range(2))
    assert len(ended) == 1


@pytest.mark.parametrize(
    ("share", "cores", "pause_per_work"), [(0.05, 2, 9.0), (0.1, 1, 9.0), (0.5, 4, 0.0), (1.0, 1, 0.0)]
)
def test_loads_take_their_share_of_the_cores_and_no_more(
    monkeypatch: pytest.MonkeyPatch, share: float, cores: int, pause_per_work: float
) -> None:
    pauses: list[float] = []
    clock = iter(range(100))
    monkeypatch.setattr(time, "sleep", pauses.append)
    monkeypatch.setattr(time, "thread_time", lambda: next(clock) * 0.001)
    kept = Pace(share=share, cores=cores, steps_run=lambda: True)
    assert [kept.keep(lambda item: item, item) for item in range(3)] == [0, 1, 2]
    assert pauses == pytest.approx([0.001 * pause_per_work] * 3 if pause_per_work else [])


def test_nothing_is_slowed_down_while_no_step_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("a pause"))
    assert Pace(share=0.01, steps_run=lambda: False).keep(lambda item: item, 5) == 5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm GPU")
def test_a_gpu_holds_what_the_host_holds(adapters: list[LoadedAdapter]) -> None:
    gpu = torch.device("cuda")
    pool = AdapterPool(modules=MODULES, device=gpu, dtype=torch.float32, pool_bytes=1 << 20, max_slots=3)
    residents = [resident for adapter in adapters if (resident := pool.place(adapter))]

    for adapter, resident in zip(adapters, residents, strict=True):
        assert torch.equal(adapter.blob, pool.read(resident).blob)
    assert_rows_agree(pool.table_set)
    for resident in residents:
        pool.evict(resident)
    assert not pool.arena.any()
    assert_rows_agree(pool.table_set)


def assert_rows_agree(tables: TableSet) -> None:
    assert torch.equal(torch.from_numpy(tables.rows.host_index), tables.rows.index.cpu())
    assert torch.equal(torch.from_numpy(tables.rows.host_scale), tables.rows.scale.cpu())
