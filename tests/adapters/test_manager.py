"""Names in, leases out: what a request and an operator may rely on."""

from __future__ import annotations

import asyncio
import errno
import os
from pathlib import Path

import pytest
import torch
from adapters.harness import (
    UNIT_BYTES,
    WAIT_S,
    Gate,
    is_pending,
    lease,
    managing,
    quiesce,
    use,
    weights,
    write_units,
)
from support.checkpoints import MODULES, edit_config, edit_tensors, write_gralora, write_lora

from gralora_runtime.adapters.catalogue.resolver import MAX_ABSENT
from gralora_runtime.adapters.catalogue.store import AdapterState
from gralora_runtime.adapters.checkpoint.header import CONFIG_FILE
from gralora_runtime.adapters.checkpoint.loader import load
from gralora_runtime.adapters.checkpoint.tensors import WEIGHTS_FILE
from gralora_runtime.adapters.residency.lease import BASE_LEASE
from gralora_runtime.errors import (
    AdapterBusyError,
    AdapterCapacityError,
    AdapterNotFoundError,
    AdapterRejectedError,
    AdapterVersionLostError,
    ConfigError,
    DescriptorShortageError,
    DrainingError,
    InvalidRequestError,
    MemoryShortageError,
)


def spoil(tensors: dict[str, torch.Tensor]) -> None:
    next(iter(tensors.values())).view(-1)[0] = float("nan")


def alter(tensors: dict[str, torch.Tensor]) -> None:
    next(iter(tensors.values())).view(-1)[0] += 1


# What is registered at start.


def test_a_scan_registers_every_directory_and_reads_no_weights(tmp_path: Path, gate: Gate) -> None:
    write_units(tmp_path, ["b", "a"])
    (tmp_path / "README.md").write_text("not an adapter")
    (tmp_path / ".cache").mkdir()

    with managing(tmp_path) as manager:
        infos = manager.list()

        assert [info.name for info in infos] == ["a", "b"]
        assert {AdapterState.REGISTERED} == {info.state for info in infos}
        assert {UNIT_BYTES} == {info.pool_bytes for info in infos}
        assert {""} == {info.digest for info in infos}
        assert gate.names == []


def test_a_broken_adapter_is_registered_with_its_reason_and_hurts_nobody(tmp_path: Path) -> None:
    write_units(tmp_path, ["good"])
    edit_config(write_gralora(tmp_path / "bias"), bias="some")
    (write_gralora(tmp_path / "cut") / WEIGHTS_FILE).write_bytes(b"123")
    write_lora(tmp_path / "wide", r=300)
    (tmp_path / "empty").mkdir()
    outside = write_gralora(tmp_path.parent / f"{tmp_path.name}-outside")
    (tmp_path / "link").symlink_to(outside)

    with managing(tmp_path) as manager:
        errors = {info.name: info.error for info in manager.list() if info.state is AdapterState.FAILED}

        assert {"bias", "cut", "wide", "empty", "link"} == errors.keys()
        assert "bias: 'some' is not supported" in errors["bias"]
        assert "is not a safetensors file" in errors["cut"]
        assert "this server takes at most 256" in errors["wide"]
        assert f"{CONFIG_FILE} is missing" in errors["empty"]
        assert "leaves the adapters directory" in errors["link"]
        assert use(manager, "good").slot == 0
        with pytest.raises(AdapterRejectedError, match="leaves the adapters directory"):
            lease(manager, "link")


def test_a_directory_that_does_not_exist_is_a_setting_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere"), managing(tmp_path / "nowhere"):
        pass


# Leases.


def test_a_lease_says_what_serves_and_where(tmp_path: Path) -> None:
    write_units(tmp_path, ["a"])
    expected = load("a", tmp_path / "a", MODULES, torch.float32, max_width=256)

    with managing(tmp_path) as manager:
        held = lease(manager, "a")

        assert ("a", expected.digest, 0, 1, 8) == (held.name, held.digest, held.slot, held.generation, held.width)
        assert torch.equal(expected.blob, weights(manager, held))
        assert AdapterState.RESIDENT is manager.get("a").state
        assert manager.get("a").in_flight == 1
        assert manager.get("a").last_used_s > 0
        manager.release(held)
        assert manager.get("a").in_flight == 0


def test_the_base_model_needs_no_lease(tmp_path: Path) -> None:
    with managing(None) as manager:
        acquired = manager.acquire("")

        assert acquired.done()
        assert BASE_LEASE is acquired.result()
        manager.release(BASE_LEASE)
        manager.release(BASE_LEASE)
        assert manager.stats().leases == 0


def test_a_lease_on_a_resident_adapter_is_there_at_once(tmp_path: Path) -> None:
    write_units(tmp_path, ["a"])
    with managing(tmp_path) as manager:
        first = lease(manager, "a")
        acquired = manager.acquire("a")

        assert acquired.done()
        assert first.slot == acquired.result().slot
        assert first != acquired.result()
        manager.release(first)
        manager.release(acquired.result())


def test_a_second_release_is_an_error(tmp_path: Path) -> None:
    """Two leases on one adapter look alike; releasing one of them twice must not take the other away."""
    write_units(tmp_path, ["a"])
    with managing(tmp_path) as manager:
        first, second = lease(manager, "a"), lease(manager, "a")
        manager.release(first)

        with pytest.raises(RuntimeError, match="released before"):
            manager.release(first)
        assert manager.stats().leases == 1
        manager.release(second)


@pytest.mark.parametrize("name", ["../a", "/a", "a/b/c", "a\0", ".", " "], ids=repr)
def test_a_name_that_is_no_name_is_a_bad_request(tmp_path: Path, name: str) -> None:
    with managing(tmp_path) as manager:
        for call in (manager.acquire, manager.get, manager.unload, manager.load):
            with pytest.raises(InvalidRequestError):
                call(name)
        with pytest.raises(InvalidRequestError):
            manager.pin(name, True)


def test_ten_thousand_unknown_names_leave_no_trace(tmp_path: Path) -> None:
    write_units(tmp_path, ["a"])
    with managing(tmp_path) as manager:
        for i in range(10_000):
            with pytest.raises(AdapterNotFoundError):
                manager.acquire(f"unknown-{i}").result(WAIT_S)
        quiesce(manager)

        assert [info.name for info in manager.list()] == ["a"]
        assert len(manager._store) == 1
        assert len(manager._discovery._resolver._absent) <= MAX_ABSENT
        assert not manager._discovery._resolver._asked
        assert (
            0
            == len(manager._mover._queue)
            == len(manager._cache)
            == len(manager._leases)
            == len(manager._mover._to_read)
        )


def test_reads_run_in_their_own_threads_and_once_for_all_who_wait(tmp_path: Path, gate: Gate) -> None:
    write_units(tmp_path, ["a"])
    with managing(tmp_path) as manager:
        gate.shut()
        acquired = [manager.acquire("a") for _ in range(20)]
        gate.wait_for_a_read()
        assert not any(future.done() for future in acquired)
        assert AdapterState.LOADING is manager.get("a").state
        assert 20 == manager.get("a").in_flight == manager.stats().waiting
        gate.open()
        leases = [future.result(WAIT_S) for future in acquired]

        assert gate.names == ["a"]
        assert all(thread.startswith("adapter-reader") for thread in gate.threads)
        assert len({held.slot for held in leases}) == 1
        assert 20 == len({held.serial for held in leases}) == manager.stats().leases
        for held in leases:
            manager.release(held)


def test_a_slow_read_does_not_hold_up_another(tmp_path: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    write_units(tmp_path, ["slow", "fast"])
    with managing(tmp_path) as manager:
        gate.shut()
        slow = manager.acquire("slow")
        gate.wait_for_a_read()
        monkeypatch.setattr("gralora_runtime.adapters.residency.mover.load", gate._load)
        manager.release(lease(manager, "fast"))

        assert not slow.done()
        gate.open()
        manager.release(slow.result(WAIT_S))


def test_the_event_loop_can_wait_for_a_lease(tmp_path: Path) -> None:
    write_units(tmp_path, ["a"])

    async def main() -> None:
        with managing(tmp_path) as manager:
            held = await asyncio.wait_for(asyncio.wrap_future(manager.acquire("a")), WAIT_S)
            assert held.name == "a"
            manager.release(held)

    asyncio.run(main())


# Failures.


def test_a_failed_load_tells_everybody_and_the_next_request_tries_again(tmp_path: Path, gate: Gate) -> None:
    path = write_gralora(tmp_path / "a", r=4)
    good = (path / WEIGHTS_FILE).read_bytes()
    edit_tensors(path, spoil)
    with managing(tmp_path) as manager:
        acquired = [manager.acquire("a") for _ in range(3)]
        for future in acquired:
            with pytest.raises(AdapterRejectedError, match="not finite"):
                future.result(WAIT_S)
        assert AdapterState.FAILED is manager.get("a").state
        assert "not finite" in manager.get("a").error
        assert manager.get("a").in_flight == 0
        (path / WEIGHTS_FILE).write_bytes(good)
        use(manager, "a")

        assert AdapterState.RESIDENT is manager.get("a").state
        assert manager.get("a").error == ""


def test_a_bug_in_the_loader_reaches_the_waiter_and_not_the_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write_units(tmp_path, ["a", "b"])

    def explode(name: str, *args: object, **options: object) -> object:
        raise ZeroDivisionError(name)

    with managing(tmp_path) as manager:
        with monkeypatch.context() as patch:
            patch.setattr("gralora_runtime.adapters.residency.mover.load", explode)
            with pytest.raises(ZeroDivisionError):
                lease(manager, "a")
        assert "loading adapter 'a' failed" in caplog.text
        use(manager, "a")
        use(manager, "b")


def test_a_bug_while_placing_leaves_nobody_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write_units(tmp_path, ["a", "b"])
    with managing(tmp_path) as manager:
        with monkeypatch.context() as patch:
            patch.setattr(manager.pool, "fill", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                lease(manager, "a")
        assert "placing an adapter failed" in caplog.text
        use(manager, "b")


def test_an_adapter_whose_files_find_no_descriptor_is_neither_refused_nor_kept_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was once "cannot be served: adapter_config.json is missing", and then not even read again for a while."""
    write_units(tmp_path, ["a"])

    def no_descriptor(*_: object, **__: object) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with managing(tmp_path, units=2) as manager:
        with monkeypatch.context() as patch:
            patch.setattr("gralora_runtime.adapters.checkpoint.file.os.open", no_descriptor)
            with pytest.raises(DescriptorShortageError, match=r"adapter_config\.json could not be opened") as caught:
                lease(manager, "a")
        quiesce(manager)
        assert caught.value.retry_after_s == 1.0
        use(manager, "a")


@pytest.mark.parametrize("step", ["read", "fill"])
def test_an_adapter_for_which_memory_runs_out_fails_alone_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    write_units(tmp_path, ["a", "b"])

    def run_out(*_: object, **__: object) -> None:
        raise MemoryError

    with managing(tmp_path, units=2) as manager:
        held = lease(manager, "b")
        with monkeypatch.context() as patch:
            if step == "read":
                patch.setattr("gralora_runtime.adapters.residency.mover.load", run_out)
            else:
                patch.setattr(manager.pool.transfer, "upload", run_out)
            with pytest.raises(MemoryShortageError, match="memory ran out while adapter 'a' was") as caught:
                lease(manager, "a")
        quiesce(manager)
        manager.check_integrity()
        assert caught.value.retry_after_s > 0
        assert manager.get("a").error == ""
        assert manager.stats().slots_used == 1
        assert manager.pool.find(held.digest) is not None
        use(manager, "a")
        manager.release(held)


def test_an_adapter_larger_than_the_pool_is_refused_without_reading_it(tmp_path: Path, gate: Gate) -> None:
    write_units(tmp_path, ["big"], units=3)
    with managing(tmp_path, units=2) as manager:
        with pytest.raises(AdapterCapacityError) as caught:
            lease(manager, "big")

        assert (caught.value.needed_bytes, caught.value.pool_bytes) == (3 * UNIT_BYTES, 2 * UNIT_BYTES)
        assert gate.names == []
        assert AdapterState.REGISTERED is manager.get("big").state


def test_a_rank_beyond_the_kernels_is_refused(tmp_path: Path) -> None:
    write_gralora(tmp_path / "a", r=8, k=4)
    with managing(tmp_path, max_width=31) as manager, pytest.raises(AdapterRejectedError, match="at most 31"):
        lease(manager, "a")


# Memory tiers.


def test_an_idle_adapter_makes_room_and_comes_back_from_host_memory(tmp_path: Path, gate: Gate) -> None:
    write_units(tmp_path, ["a", "b", "c"])
    with managing(tmp_path, units=2) as manager:
        before = lease(manager, "a")
        blob = weights(manager, before)
        manager.release(before)
        use(manager, "b")
        use(manager, "c")
        assert AdapterState.HOST is manager.get("a").state
        assert manager.stats().host_bytes_used == UNIT_BYTES
        after = lease(manager, "a")

        assert gate.names == ["a", "b", "c"]
        assert torch.equal(blob, weights(manager, after))
        assert before.digest == after.digest
        assert AdapterState.HOST is manager.get("b").state
        assert (manager.stats().placements, manager.stats().evictions) == (4, 2)
        manager.release(after)


def test_without_a_host_cache_an_evicted_adapter_is_read_again(tmp_path: Path, gate: Gate) -> None:
    write_units(tmp_path, ["a", "b"])
    with managing(tmp_path, units=1, host_units=0) as manager:
        for name in "aba":
            use(manager, name)

        assert gate.names == ["a", "b", "a"]
        assert AdapterState.REGISTERED is manager.get("b").state


def test_a_reused_slot_has_another_generation(tmp_path: Path) -> None:
    write_units(tmp_path, ["a", "b"])
    with managing(tmp_path, units=2, slots=1) as manager:
        a, b = use(manager, "a"), use(manager, "b")

        assert a.slot == b.slot == 0
        assert a.generation < b.generation == manager.pool.generation(0)


def test_the_least_recently_used_goes_first(tmp_path: Path) -> None:
    write_units(tmp_path, ["a", "b", "c"])
    with managing(tmp_path, units=2) as manager:
        for name in "abac":
            use(manager, name)

        states = [manager.get(name).state for name in "abc"]
        assert states == [AdapterState.RESIDENT, AdapterState.HOST, AdapterState.RESIDENT]


def test_a_leased_adapter_is_never_evicted(tmp_path: Path) -> None:
    write_units(tmp_path, ["a", "b", "c"])
    with managing(tmp_path, units=2) as manager:
        held = lease(manager, "a")
        blob = weights(manager, held)
        for name in "bcbcb":
            use(manager, name)
            assert torch.equal(blob, weights(manager, held))
        manager.release(held)


def test_a_pinned_adapter_is_never_evicted_and_an_unpinned_one_is(tmp_path: Path) -> None:
    write_units(tmp_path, ["a", "b", "c"])
    with managing(tmp_path, units=2) as manager:
        pinned = manager.load("a", pin=True).result(WAIT_S)
        assert pinned.pinned
        assert AdapterState.RESIDENT is pinned.state
        for name in "bcb":
            use(manager, name)
        assert AdapterState.RESIDENT is manager.get("a").state
        manager.pin("a", False)
        for name in "cb":
            use(manager, name)

        assert AdapterState.HOST is manager.get("a").state


def test_pinning_brings_an_adapter_into_the_pool(tmp_path: Path) -> None:
    write_units(tmp_path, ["a"])
    with managing(tmp_path) as manager:
        assert manager.pin("a", True).pinned
        quiesce(manager)

        assert AdapterState.RESIDENT is manager.get("a").state
        assert manager.get("a").in_flight == 0


def test_beside_pinned_adapters_there_may_be_no_room_ever(tmp_path: Path) -> None:
    write_units(tmp_path, ["a", "b", "c"])
    with managing(tmp_path, units=2) as manager:
        for name in "ab":
            manager.load(name, pin=True).result(WAIT_S)

        with pytest.raises(AdapterCapacityError):
            lease(manager, "c")
        with pytest.raises(AdapterCapacityError):
            manager.pin("c", True)
        assert not manager.get("c").pinned
        manager.pin("a", False)
        use(manager, "c")


def test_two_names_with_the_same_content_share_a_slot(tmp_path: Path) -> None:
    write_gralora(tmp_path / "a", r=4)
    write_gralora(tmp_path / "b", r=4, gralora_dropout=0.5)
    with managing(tmp_path, units=2) as manager:
        a, b = lease(manager, "a"), lease(manager, "b")

        assert (a.slot, a.generation, a.digest) == (b.slot, b.generation, b.digest)
        assert (a.name, b.name) == ("a", "b")
        assert manager.stats().pool_bytes_used == UNIT_BYTES
        manager.release(a)
        manager.release(b)


def test_two_names_with_the_same_content_read_at_the_same_time_share_a_slot(tmp_path: Path, gate: Gate) -> None:
    for name in "ab":
        write_gralora(tmp_path / name, r=4)
    with managing(tmp_path, units=2) as manager:
        gate.shut()
        acquired = [manager.acquire(name) for name in "abab"]
        gate.wait_for_a_read()
        gate.wait_for_a_read()
        gate.open()
        leases = [future.result(WAIT_S) for future in acquired]

        assert len({(held.slot, held.generation) for held in leases}) == 1
        assert manager.stats().pool_bytes_used == UNIT_BYTES
        for held in leases:
            manager.release(held)


# Content that changes on disk.


def test_files_that_change_before_the_first_load_are_loaded_as_they_are(tmp_path: Path) -> None:
    path = write_gralora(tmp_path / "a", r=4)
    old = load("a", path, MODULES, torch.float32, max_width=256)
    with managing(tmp_path) as manager:
        edit_tensors(path, alter)
        held = use(manager, "a")

        assert held.digest != old.digest
        assert held.digest == manager.get("a").digest


def test_files_that_change_after_a_load_become_another_version(tmp_path: Path) -> None:
    """Unwatched, that is seen when they are read again: the name goes on with them, and its first version is gone."""
    path = write_gralora(tmp_path / "a", r=4)
    write_units(tmp_path, ["b"])
    with managing(tmp_path, units=1, host_units=0) as manager:
        old = use(manager, "a")
        edit_tensors(path, alter)
        assert old.digest == use(manager, "a").digest  # what is resident does not change
        use(manager, "b")
        new = use(manager, "a")
        use(manager, "b")
        with pytest.raises(AdapterVersionLostError, match="other content since"):
            lease(manager, "a@1")

        assert old.digest != new.digest
        assert [old.version, new.version] == [1, 2]
        assert [version.number for version in manager.get("a").versions] == [1, 2]
        assert new.digest == use(manager, "a@2").digest


def test_an_evicted_adapter_in_host_memory_is_served_as_what_it_was(tmp_path: Path) -> None:
    path = write_gralora(tmp_path / "a", r=4)
    write_units(tmp_path, ["b"])
    with managing(tmp_path, units=1) as manager:
        old = use(manager, "a")
        use(manager, "b")
        edit_tensors(path, alter)

        assert old.digest == use(manager, "a").digest


def test_loading_a_known_name_again_is_fine_while_its_content_is_the_same(tmp_path: Path) -> None:
    path = write_gralora(tmp_path / "a", r=4)
    write_gralora(tmp_path / "copy", r=4)
    write_units(tmp_path, ["b"])
    with managing(tmp_path, units=1) as manager:
        first = manager.load("a").result(WAIT_S)
        held = lease(manager, "a")
        assert first.digest == manager.load("a").result(WAIT_S).digest
        assert first.digest == manager.load("a", Path("copy")).result(WAIT_S).digest
        manager.release(held)
        use(manager, "b")
        assert AdapterState.RESIDENT is manager.load("a").result(WAIT_S).state  # it had been evicted
        edit_tensors(path, alter)
        second = manager.load("a").result(WAIT_S)
        third = manager.load("a", Path("b")).result(WAIT_S)
        fourth = manager.load("a", Path("copy")).result(WAIT_S)

        assert [version.number for version in fourth.versions] == [1, 2, 3]
        assert [info.version for info in (first, second, third, fourth)] == [1, 2, 3, 1]
        assert first.digest == fourth.digest == use(manager, "a").digest


def test_a_failed_name_can_be_loaded_from_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    write_units(tmp_path, ["b"])
    with managing(tmp_path) as manager:
        info = manager.load("a", Path("b")).result(WAIT_S)

        assert AdapterState.RESIDENT is info.state
        assert str(tmp_path / "b") == info.source


# Loading and unloading by an operator.


def test_a_new_directory_is_loaded_by_name_or_by_path(tmp_path: Path) -> None:
    with managing(tmp_path) as manager:
        write_units(tmp_path, ["a"])
        write_units(tmp_path / "team", ["b"])
        assert manager.load("a").result(WAIT_S).name == "a"
        manager.load("b2", Path("team/b")).result(WAIT_S)

        assert use(manager, "b2").name == "b2"


@pytest.mark.parametrize("path", ["../x", "/etc", "a/../.."], ids=repr)
def test_nothing_outside_of_the_adapters_directory_is_loaded(tmp_path: Path, path: str) -> None:
    with managing(tmp_path) as manager, pytest.raises(InvalidRequestError):
        manager.load("a", Path(path))


def test_a_new_name_that_cannot_be_loaded_is_not_kept(tmp_path: Path) -> None:
    with managing(tmp_path) as manager:
        for i in range(20):
            with pytest.raises(AdapterNotFoundError):
                manager.load(f"typo-{i}").result(WAIT_S)

        assert manager.list() == ()


def test_unloading_frees_and_zeroes_the_slot_and_forgets_the_name(tmp_path: Path) -> None:
    write_units(tmp_path, ["a", "b"])
    with managing(tmp_path) as manager:
        a, b = use(manager, "a"), use(manager, "b")
        result = manager.unload("a")
        kept = manager.pool.find(b.digest)
        assert kept is not None
        range_of_b = slice(kept.offset, kept.offset + kept.layout.numel)

        assert (a.digest, UNIT_BYTES, 0) == (result.digest, result.pool_bytes_freed, result.host_bytes_freed)
        assert manager.stats().pool_bytes_used == UNIT_BYTES
        assert manager.pool.arena[range_of_b].any()
        manager.pool.arena[range_of_b] = 0
        assert not manager.pool.arena.any()
        assert not any(table.index[a.slot].any() for table in manager.pool.tables.values())
        with pytest.raises(AdapterNotFoundError):
            lease(manager, "a")


def test_unloading_frees_host_memory_too(tmp_path: Path) -> None:
    write_units(tmp_path, ["a", "b"])
    with managing(tmp_path, units=1) as manager:
        use(manager, "a")
        use(manager, "b")
        result = manager.unload("a")

        assert (result.pool_bytes_freed, result.host_bytes_freed) == (0, UNIT_BYTES)
        assert manager.stats().host_bytes_used == 0


def test_an_adapter_in_use_is_not_unloaded(tmp_path: Path, gate: Gate) -> None:
    write_units(tmp_path, ["a", "b"])
    with managing(tmp_path) as manager:
        held = [lease(manager, "a"), lease(manager, "a")]
        with pytest.raises(AdapterBusyError) as caught:
            manager.unload("a")
        assert caught.value.in_flight == 2
        gate.shut()
        waiting = manager.acquire("b")
        with pytest.raises(AdapterBusyError):
            manager.unload("b")
        gate.open()
        manager.release(waiting.result(WAIT_S))
        for one in held:
            manager.release(one)

        assert manager.unload("a").pool_bytes_freed == UNIT_BYTES


def test_content_that_another_name_has_stays_where_it_is(tmp_path: Path) -> None:
    for name in "ab":
        write_gralora(tmp_path / name, r=4)
    with managing(tmp_path) as manager:
        use(manager, "a")
        held = lease(manager, "b")
        result = manager.unload("a")

        assert (result.pool_bytes_freed, result.host_bytes_freed) == (0, 0)
        assert weights(manager, held).any()
        manager.release(held)
        assert manager.unload("b").pool_bytes_freed == UNIT_BYTES


def test_the_pin_of_an_unloaded_name_does_not_outlive_it(tmp_path: Path) -> None:
    for name in "ab":
        write_gralora(tmp_path / name, r=4)
    write_units(tmp_path, ["c"])
    with managing(tmp_path, units=1) as manager:
        manager.load("a", pin=True).result(WAIT_S)
        use(manager, "b")
        with pytest.raises(AdapterCapacityError):
            lease(manager, "c")
        manager.unload("a")

        use(manager, "c")


def test_a_load_that_was_unloaded_while_nobody_waited_comes_to_nothing(tmp_path: Path, gate: Gate) -> None:
    write_units(tmp_path, ["a"])
    with managing(tmp_path) as manager:
        gate.shut()
        waiting = manager.acquire("a")
        gate.wait_for_a_read()
        assert waiting.cancel()
        manager.unload("a")
        gate.open()
        quiesce(manager)

        assert manager.list() == ()
        assert 0 == manager.stats().pool_bytes_used == manager.stats().host_bytes_used


# Giving up.


def test_cancelling_while_it_is_read_keeps_the_adapter_in_host_memory_at_most(tmp_path: Path, gate: Gate) -> None:
    write_units(tmp_path, ["a"])
    with managing(tmp_path) as manager:
        gate.shut()
        waiting = manager.acquire("a")
        gate.wait_for_a_read()

        assert waiting.cancel()
        assert manager.get("a").in_flight == 0
        gate.open()
        quiesce(manager)
        assert AdapterState.HOST is manager.get("a").state
        assert manager.stats().pool_bytes_used == 0


def test_cancelling_before_it_is_read_saves_the_read(tmp_path: Path, gate: Gate) -> None:
    names = [f"a{i}" for i in range(20)]
    write_units(tmp_path, names)
    with managing(tmp_path, units=20, slots=20) as manager:
        gate.shut()
        waiting = [manager.acquire(name) for name in names]
        gate.wait_for_a_read()
        for future in waiting:
            assert future.cancel()
        gate.open()
        quiesce(manager)

        assert len(gate.names) < len(names)
        assert manager.stats().waiting == 0
        assert manager.stats().pool_bytes_used == 0


def test_abandoning_releases_what_was_answered_already(tmp_path: Path, gate: Gate) -> None:
    write_units(tmp_path, ["a", "b"])
    with managing(tmp_path) as manager:
        answered = manager.acquire("a")
        answered.result(WAIT_S)
        manager.abandon(answered)
        gate.shut()
        unanswered = manager.acquire("b")
        manager.abandon(unanswered)
        gate.open()
        failed = manager.acquire("a")
        manager.release(failed.result(WAIT_S))

        assert unanswered.cancelled()
        assert manager.stats().leases == 0
        assert manager.get("b").in_flight == 0


def test_closing_answers_everybody(tmp_path: Path, gate: Gate) -> None:
    write_units(tmp_path, ["a", "b", "c"])
    with managing(tmp_path, units=1) as manager:
        held = lease(manager, "a")
        blocked = manager.acquire("b")
        assert is_pending(manager, blocked)
        gate.shut()
        reading = manager.acquire("c")
        gate.wait_for_a_read()
        gate.wait_for_a_read()
        gate.wait_for_a_read()
        gate.open()
        manager.close()

        for future in (blocked, reading):
            with pytest.raises(DrainingError):
                future.result(WAIT_S)
        with pytest.raises(DrainingError):
            manager.acquire("a")
        manager.release(held)


def test_all_descriptions_add_up(tmp_path: Path) -> None:
    write_units(tmp_path, ["a", "b", "c"])
    with managing(tmp_path, units=2, slots=4, host_units=3) as manager:
        for name in "abc":
            use(manager, name)
        held = lease(manager, "c")
        stats = manager.stats()

        assert (stats.adapters, stats.leases, stats.waiting) == (3, 1, 0)
        assert (stats.slots_used, stats.slots_total) == (2, 4)
        assert (stats.pool_bytes_used, stats.pool_bytes_total) == (2 * UNIT_BYTES, 2 * UNIT_BYTES)
        assert (stats.host_bytes_used, stats.host_bytes_total) == (UNIT_BYTES, 3 * UNIT_BYTES)
        assert (stats.loads, stats.placements, stats.evictions) == (3, 3, 1)
        manager.release(held)


def test_residency_counts_all_and_names_as_many_as_wanted(tmp_path: Path) -> None:
    write_units(tmp_path, ["a", "b", "c", "d"])
    with managing(tmp_path, units=2, slots=4, host_units=3) as manager:
        for name in "abc":
            use(manager, name)
        everything, some, none = manager.residency(9), manager.residency(2, first={"a"}), manager.residency(0)

    here, host = AdapterState.RESIDENT, AdapterState.HOST
    assert everything.counts == dict.fromkeys(AdapterState, 0) | {here: 2, host: 1, AdapterState.REGISTERED: 1}
    assert {(r.name, r.state, r.bytes) for r in everything.residences} == {
        ("a", host, UNIT_BYTES),
        ("b", here, UNIT_BYTES),
        ("c", here, UNIT_BYTES),
    }
    assert [r.name for r in some.residences] == ["a", "c"]
    assert none.residences == ()
    assert none.counts == everything.counts


def test_reads_are_timed_and_those_that_fail_are_counted(tmp_path: Path) -> None:
    write_units(tmp_path, ["a", "b"])
    with managing(tmp_path) as manager:
        use(manager, "a")
        (tmp_path / "b" / WEIGHTS_FILE).unlink()
        with pytest.raises(AdapterRejectedError):
            lease(manager, "b")
        stats = manager.stats()

    assert (stats.loads, stats.load_failures, stats.load_s.count) == (1, 1, 2)


def test_a_pipe_in_place_of_the_weights_does_not_hang_a_reader(tmp_path: Path) -> None:
    path = write_gralora(tmp_path / "a", r=4)
    with managing(tmp_path) as manager:
        (path / WEIGHTS_FILE).unlink()
        os.mkfifo(path / WEIGHTS_FILE)

        with pytest.raises(AdapterRejectedError, match="is missing"):
            lease(manager, "a")
