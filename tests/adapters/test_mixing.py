"""Several adapters at once: their sum is leased, evicted and reloaded like an adapter, and is nobody else's."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters.harness import UNIT_BYTES, WAIT_S, Gate, managing, quiesce, use, weights, write_units
from adapters.test_admission import RIGHT, VOCAB_SIZE, Engine, write_golden
from adapters.test_shares import shares
from adapters.test_versions import write_version
from support.checkpoints import MODULES, edit_config, write_lora

from gralora_kernels.packing import ROW_MAJOR
from gralora_runtime.adapters import mixing
from gralora_runtime.adapters.catalogue.numerics import IN_A_ROW
from gralora_runtime.adapters.checkpoint.loader import load
from gralora_runtime.adapters.checkpoint.mixture import Ingredient, mixed, mixture_digest
from gralora_runtime.adapters.manager import AdapterManager
from gralora_runtime.adapters.mixing import MAX_FORGOTTEN
from gralora_runtime.adapters.residency.lease import AdapterLease
from gralora_runtime.adapters.residency.pool import AdapterPool
from gralora_runtime.errors import (
    AdapterBusyError,
    AdapterNotFoundError,
    AdapterQuarantinedError,
    AdapterRejectedError,
    AdapterVersionNotFoundError,
    DrainingError,
    InvalidRequestError,
    QuotaExceededError,
)
from gralora_runtime.request import WeightedAdapter

Named = tuple[str, float]


def ask(manager: AdapterManager, *parts: Named) -> Future[AdapterLease]:
    return manager.acquire_mix([WeightedAdapter(name, weight) for name, weight in parts])


def get(manager: AdapterManager, *parts: Named) -> AdapterLease:
    return ask(manager, *parts).result(WAIT_S)


def use_mix(manager: AdapterManager, *parts: Named) -> AdapterLease:
    held = get(manager, *parts)
    manager.release(held)
    return held


def blob_of(root: Path, parts: Sequence[Named]) -> torch.Tensor:
    loaded = [
        Ingredient(load(name, root / name, MODULES, torch.float32, max_width=256), weight) for name, weight in parts
    ]
    return mixed("m", loaded, MODULES, packing=ROW_MAJOR, max_width=256).blob


def num_mixes(manager: AdapterManager) -> int:
    return manager._store.num_mixes


@contextmanager
def two_units(tmp_path: Path, **options: float) -> Iterator[AdapterManager]:
    write_units(tmp_path, ["a", "b"])
    with managing(tmp_path, **{"units": 4, **options}) as manager:
        yield manager


def test_a_mix_is_leased_and_says_what_it_is_made_of(tmp_path: Path, gate: Gate) -> None:
    with two_units(tmp_path) as manager:
        held = get(manager, ("b", -1.0), ("a", 0.5))

        assert torch.equal(weights(manager, held), blob_of(tmp_path, [("a", 0.5), ("b", -1.0)]))
        assert (held.name, held.label, held.version) == ("a*0.5+b*-1", "a@1*0.5+b@1*-1", 0)
        alone = {name: use(manager, name) for name in "ab"}
        assert [(part.name, part.version, part.digest, part.weight) for part in held.parts] == [
            ("a", 1, alone["a"].digest, 0.5),
            ("b", 1, alone["b"].digest, -1.0),
        ]
        assert held.digest == mixture_digest([(alone["a"].digest, 0.5), (alone["b"].digest, -1.0)])
        again = ask(manager, ("a", 0.5), ("b", -1.0))
        assert again.done(), "it was there"
        assert again.result().slot == held.slot
        manager.release(held)
        manager.release(again.result())
        assert sorted(gate.names) == ["a", "b"]
        assert [info.name for info in manager.list()] == ["a", "b"]


def test_one_adapter_with_weight_1_is_that_adapter(tmp_path: Path) -> None:
    with two_units(tmp_path) as manager:
        assert use_mix(manager, ("a", 1.0)).digest == use(manager, "a").digest
        assert num_mixes(manager) == 0
        half = use_mix(manager, ("a", 0.5))
        assert half.label == "a@1*0.5"
        assert half.digest != use(manager, "a").digest


def test_other_weights_and_other_order_share_nothing_and_everything(tmp_path: Path) -> None:
    with two_units(tmp_path, units=16) as manager:
        digests = [
            use_mix(manager, *parts).digest
            for parts in (
                [("a", 0.5), ("b", 1.0)],
                [("b", 1.0), ("a", 0.5)],
                [("a", 1.0), ("b", 0.5)],
                [("a", 0.5), ("b", 1.0), ("a", 0.5)],
            )
        ]
        assert digests[0] == digests[1]
        assert len({*digests, use(manager, "a").digest, use(manager, "b").digest}) == 5


def test_an_adapter_that_is_named_twice_counts_twice(tmp_path: Path) -> None:
    with two_units(tmp_path) as manager:
        held = get(manager, ("a", 0.5), ("a", 0.25))
        assert torch.equal(weights(manager, held), blob_of(tmp_path, [("a", 0.25), ("a", 0.5)]))
        manager.release(held)


@pytest.mark.parametrize("host_units", [0, 8])
def test_an_evicted_mix_comes_back_the_same(tmp_path: Path, gate: Gate, host_units: int) -> None:
    """From host memory, or made again of parts that are read again. There is room for the mix and for nothing else."""
    parts = [("a", 0.7), ("b", -0.25)]
    with two_units(tmp_path, units=2, host_units=host_units) as manager:
        first = get(manager, *parts)
        expected = weights(manager, first)
        manager.release(first)
        use(manager, "a")
        quiesce(manager)
        assert manager.pool.find(first.digest) is None
        reads = len(gate.names)

        second = get(manager, *parts)
        assert torch.equal(weights(manager, second), expected)
        assert second.digest == first.digest
        assert (len(gate.names) == reads) == (host_units > 0)
        manager.release(second)


def test_many_mixes_at_once_in_a_pool_for_one_do_not_wait_for_each_other_s_parts(tmp_path: Path) -> None:
    """Whoever held a part while it waited for room for the next one would wait for ever."""
    names = "abcdef"
    write_units(tmp_path, names)
    wanted = [[(one, 0.5), (other, 2.0)] for one in names for other in names if one < other]
    with managing(tmp_path, units=2, slots=2, host_units=0) as manager, ThreadPoolExecutor(len(wanted)) as threads:
        for held in threads.map(lambda parts: use_mix(manager, *parts), wanted):
            assert held.parts
        quiesce(manager)


def test_a_replaced_part_is_in_later_mixes_and_not_in_one_that_runs(tmp_path: Path) -> None:
    with two_units(tmp_path, units=8) as manager:
        before = get(manager, ("a", 0.5), ("b", 2.0))
        old = weights(manager, before)
        write_version(tmp_path, "a", 7)
        manager.load("a").result(WAIT_S)
        after = get(manager, ("a", 0.5), ("b", 2.0))

        assert (before.label, after.label) == ("a@1*0.5+b@1*2", "a@2*0.5+b@1*2")
        assert before.digest != after.digest
        assert torch.equal(weights(manager, before), old)
        assert torch.equal(weights(manager, after), blob_of(tmp_path, [("a", 0.5), ("b", 2.0)]))
        named = get(manager, ("a@1", 0.5), ("b", 2.0))
        assert named.digest == before.digest
        for held in (before, after, named):
            manager.release(held)


def test_a_part_whose_files_changed_unnoticed_is_what_they_hold_by_now(tmp_path: Path) -> None:
    with two_units(tmp_path, units=2, host_units=0) as manager:
        first = use_mix(manager, ("a", 0.5), ("b", 2.0))
        use(manager, "b")
        write_version(tmp_path, "a", 7)
        second = get(manager, ("a", 0.5), ("b", 2.0))

        assert second.digest != first.digest
        assert second.label == "a@2*0.5+b@1*2"
        assert torch.equal(weights(manager, second), blob_of(tmp_path, [("a", 0.5), ("b", 2.0)]))
        manager.release(second)


def test_a_part_is_in_use_while_a_mix_is_and_takes_it_along_when_it_is_unloaded(tmp_path: Path) -> None:
    with two_units(tmp_path) as manager:
        held = get(manager, ("a", 0.5), ("b", 2.0))
        assert manager.get("a").in_flight == 1
        with pytest.raises(AdapterBusyError):
            manager.unload("a")
        manager.release(held)
        result = manager.unload("a")
        quiesce(manager)

        assert result.pool_bytes_freed == 3 * UNIT_BYTES
        assert manager.pool.find(held.digest) is None
        assert num_mixes(manager) == 0
        assert [info.name for info in manager.list()] == ["b"]
        with pytest.raises(AdapterNotFoundError, match="'a'"):
            get(manager, ("a", 0.5), ("b", 2.0))


def test_errors_name_the_part_and_end_with_their_cause(tmp_path: Path) -> None:
    with two_units(tmp_path) as manager:
        with pytest.raises(AdapterNotFoundError, match="'nobody'"):
            get(manager, ("a", 0.5), ("nobody", 2.0))
        with pytest.raises(AdapterVersionNotFoundError, match="'b' has no version 7"):
            get(manager, ("a", 0.5), ("b@7", 2.0))
        with pytest.raises(InvalidRequestError) as caught:
            ask(manager, ("a", 0.5), ("no name", 2.0))
        assert caught.value.field == "adapters[1].name"
        edit_config(write_lora(tmp_path / "broken"), use_dora="perhaps")
        with pytest.raises(AdapterRejectedError, match="'broken'"):
            get(manager, ("a", 0.5), ("broken", 2.0))
        edit_config(tmp_path / "broken", use_dora=False)
        assert use_mix(manager, ("a", 0.5), ("broken", 2.0)).parts[1].name == "broken"


def test_a_name_that_nobody_knew_is_looked_for_when_it_is_asked_for(tmp_path: Path) -> None:
    with two_units(tmp_path) as manager:
        write_units(tmp_path, ["late", "later"])
        held = get(manager, ("late", 0.5), ("a", 1.0), ("later", 2.0))
        assert held.label == "a@1+late@1*0.5+later@1*2"
        assert torch.equal(weights(manager, held), blob_of(tmp_path, [("a", 1.0), ("late", 0.5), ("later", 2.0)]))
        manager.release(held)


def test_too_many_ranks_together_are_refused_and_not_added_up_again(tmp_path: Path) -> None:
    with two_units(tmp_path, max_width=12) as manager:
        for _ in range(2):
            with pytest.raises(AdapterRejectedError, match=r"'a\*0.5\+b' cannot be served: .* are 16 together"):
                use_mix(manager, ("a", 0.5), ("b", 1.0))
        quiesce(manager)
        assert manager.stats().placements == 2, "the parts came once"
        assert use(manager, "a").version == 1


def test_golden_prompts_of_a_part_are_answered_first(tmp_path: Path) -> None:
    write_units(tmp_path, ["b"])
    write_units(tmp_path, ["a"])
    write_golden(tmp_path, "a", RIGHT)
    with managing(tmp_path, units=8, vocab_size=VOCAB_SIZE) as manager:
        asked = ask(manager, ("a", 0.5), ("b", 1.0))
        quiesce(manager)
        assert not asked.done()
        engine = Engine(manager)
        manager.examine_with(engine.examine)
        manager.release(asked.result(WAIT_S))
        assert {label for label, _ in engine.asked} == {"a@1"}


def test_who_gives_no_numbers_is_kept_apart_alone_and_in_a_mix(tmp_path: Path) -> None:
    parts = [("a", 0.5), ("b", 1.0)]
    with two_units(tmp_path, units=8) as manager:
        label = use_mix(manager, *parts).label
        for _ in range(IN_A_ROW):
            manager.note_answer(label, "NaN")
        with pytest.raises(AdapterQuarantinedError, match=r"'a@1\*0.5\+b@1'"):
            use_mix(manager, *parts)
        assert use_mix(manager, ("a", 0.25), ("b", 1.0)).parts
        assert use(manager, "a").name == "a"
        for _ in range(IN_A_ROW):
            manager.note_answer("b@1", "NaN")
        with pytest.raises(AdapterQuarantinedError, match="'b@1'"):
            use_mix(manager, ("a", 0.25), ("b", 1.0))


def test_it_counts_in_the_share_of_the_owner_of_each_part(tmp_path: Path) -> None:
    write_units(tmp_path, ["a1", "a2", "x1"])
    with managing(tmp_path, units=16) as manager:
        manager.limit_pool(shares(a=2))
        use_mix(manager, ("a1", 0.5), ("x1", 1.0))
        quiesce(manager)
        assert manager.pool.used_bytes == 3 * UNIT_BYTES, "the mix and what is not theirs: a1 had to go"
        with pytest.raises(QuotaExceededError, match=r"adapter 'a"):
            use_mix(manager, ("a1", 0.5), ("a2", 1.0), ("x1", 0.1))


def test_watchers_hear_of_the_parts_and_of_no_other_name(tmp_path: Path) -> None:
    with two_units(tmp_path) as manager:
        watch = manager.watch("", lambda: None)
        watch.take(10)
        held = get(manager, ("a", 0.5), ("b", 1.0))
        quiesce(manager)
        news = watch.take(10)
        assert news is not None
        assert [(info.name, info.in_flight) for info in news.adapters] == [("a", 1), ("b", 1)]
        assert news.removed == ()
        manager.release(held)
        watch.close()


def test_weights_that_anybody_can_think_of_leave_no_trace(tmp_path: Path) -> None:
    with two_units(tmp_path, units=4, host_units=0) as manager:
        for at in range(3 * MAX_FORGOTTEN):
            use_mix(manager, ("a", 1.0 + at), ("b", 1.0))
        assert num_mixes(manager) <= MAX_FORGOTTEN + 2 * 4
        manager.tidy()
        assert num_mixes(manager) <= 2
        quiesce(manager)


def test_parts_are_copied_and_added_up_in_the_threads_that_move_adapters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never in the one that asks: it is the event loop's, and what steps wait for."""
    threads: list[str] = []
    add_up, read = mixing.mixed, AdapterPool.read

    def noted(*args: Any, **options: Any) -> Any:
        threads.append(threading.current_thread().name)
        return add_up(*args, **options)

    def noted_read(*args: Any) -> Any:
        threads.append(threading.current_thread().name)
        return read(*args)

    monkeypatch.setattr(mixing, "mixed", noted)
    monkeypatch.setattr(AdapterPool, "read", noted_read)
    with two_units(tmp_path) as manager:
        use_mix(manager, ("a", 0.5), ("b", 1.0))
    assert [name.rpartition("_")[0] for name in threads] == ["adapter-placer", "adapter-placer", "adapter-reader"]


def test_closing_tells_who_waits_for_a_mix(tmp_path: Path, gate: Gate) -> None:
    write_units(tmp_path, ["a", "b"])
    gate.shut()
    with managing(tmp_path, units=4) as manager:
        asked = ask(manager, ("a", 0.5), ("b", 1.0))
        gate.wait_for_a_read()
        with ThreadPoolExecutor(1) as thread:
            closing = thread.submit(manager.close)
            with pytest.raises(DrainingError):
                asked.result(WAIT_S)
            gate.open()
            closing.result(WAIT_S)


def test_a_storm_of_mixes_gets_the_right_weights_and_leaves_the_books_in_order(tmp_path: Path) -> None:
    """Requests that hold and abandon, files that change, an operator who unloads and loads, and little room."""
    names = "abcd"
    write_units(tmp_path, names)
    wanted = [[(one, 0.5), (other, -2.0)] for one in names for other in names if one != other]
    expected = {str(parts): blob_of(tmp_path, parts) for parts in wanted}
    with managing(tmp_path, units=5, slots=4, host_units=3) as manager, ThreadPoolExecutor(5) as threads:

        def request(seed: int) -> int:
            rng, served = random.Random(seed), 0
            for _ in range(40):
                parts = rng.choice(wanted)
                acquired = ask(manager, *parts) if rng.random() < 0.7 else manager.acquire(parts[0][0])
                if rng.random() < 0.2:
                    manager.abandon(acquired)
                    continue
                try:
                    held = acquired.result(WAIT_S)
                except AdapterNotFoundError:  # it is being loaded anew
                    continue
                if held.parts:
                    assert torch.equal(expected[str(parts)], weights(manager, held)), "another mix's weights"
                    served += 1
                manager.release(held)
            return served

        def operate() -> int:
            rng = random.Random(99)
            for _ in range(30):
                name = rng.choice(names)
                try:
                    manager.unload(name)
                    manager.load(name).result(WAIT_S)
                except AdapterBusyError:
                    pass
                manager.check_integrity()
            return 1

        done = [threads.submit(request, seed) for seed in range(4)] + [threads.submit(operate)]
        assert all(future.result(10 * WAIT_S) for future in done)
        quiesce(manager)
