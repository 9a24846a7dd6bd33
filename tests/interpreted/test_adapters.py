"""The adapter kernels against the reference: every layout, every step, and nothing that is not theirs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from support.embedding_cases import SLOTS, VOCAB, embedding_case, expected, looked_up
from support.kernel_cases import CPU, MIXED, make_case, token_slots
from support.numeric import BOUNDS

from gralora_kernels.dispatch import resolve_backend
from gralora_kernels.replay import ReplayError
from gralora_kernels.tables import Entry, GroupTable
from gralora_kernels.triton_ops.adapters import launch
from gralora_kernels.triton_ops.adapters.launch import BLOCKING, TritonBackend
from gralora_kernels.warmup import warm_up_backend
from gralora_kernels.work import Blocking, plan_work

BOUND = BOUNDS[torch.float32]


@pytest.fixture
def backend() -> TritonBackend:
    return resolve_backend("triton", CPU)


@pytest.mark.parametrize("hidden", [64, 40, 300])
def test_rows_of_an_embedding(backend, hidden):
    case = embedding_case(hidden, keeps_16_bit=False)  # as an arena of this backend is
    slots = [6, *token_slots(30, len(SLOTS))]
    ids = torch.randint(0, VOCAB, (31,), generator=torch.Generator().manual_seed(3))

    found = looked_up(case, backend, slots, ids)

    torch.testing.assert_close(found, expected(case, slots, ids))
    assert torch.equal(found[:1], looked_up(case, backend, slots[:1], ids[:1]))


WIDTHS = [(576, [192]), (1536, [64]), (48, [40]), (64, [72, 24, 24]), (40, [72, 72])]


@pytest.mark.parametrize("num_tokens", [1, 7, 37])
@pytest.mark.parametrize(("in_features", "outs"), WIDTHS, ids=str)
def test_all_layouts_in_one_step(backend, in_features, outs, num_tokens):
    slots = token_slots(num_tokens, len(MIXED), seed=num_tokens)
    slots[0] = 3

    assert make_case(in_features, outs, MIXED).error(backend, slots) <= BOUND


@pytest.mark.parametrize(("r", "k"), [(1, 1), (2, 2), (3, 1), (12, 4), (64, 8)])
def test_a_rank_alone_and_beside_its_hybrid(backend, r, k):
    assert make_case(96, 48, [[(r, k)], [(r, k), (5, 1)]]).error(backend, [0, -1, 1, 0, 0, 1, 1]) <= BOUND


@pytest.mark.parametrize(
    ("layouts", "slots"),
    [
        pytest.param([[(2, 1 + i % 2)] for i in range(33)], list(range(33)), id="33 adapters"),
        pytest.param([[(4, 2)]], [0] * 48, id="one tile and a half"),
        pytest.param([[(4, 2), (6, 3)]], [0] * 3, id="hybrid of two ks"),
        pytest.param([[], [(4, 2)], []], [0, 2, 1, -1, 0], id="gains without matrices"),
    ],
)
def test_other_steps(backend, layouts, slots):
    assert make_case(96, [48, 96], layouts).error(backend, slots) <= BOUND


@pytest.mark.usefixtures("row_by_row_products")
@pytest.mark.parametrize("blocking", [BLOCKING, None], ids=["split", "whole"])
def test_a_token_has_the_same_bits_alone_and_in_any_step(backend, monkeypatch, blocking):
    """Of 2,500 input features: three stretches, each an item of its own in small steps and one after the other in large
    ones."""
    case = make_case(2500, [40, 20], [[(8, 1)], [(10, 5), (4, 1)], [(4, 2)]])
    slots = [0, 1, 2, 0, -1, 1, 1]
    x, y, grouping = case.step(slots)
    if blocking is None:
        monkeypatch.setattr(backend, "_blocking", replace(BLOCKING, split_tokens=2))
    together = case.apply(backend, x, y, grouping)
    many = case.apply(backend, x.repeat(6, 1), y.repeat(6, 1), case.grouping(slots * 6))

    assert BLOCKING.depth < 2500 / 2
    for t, slot in enumerate(slots):
        alone = case.apply(resolve_backend("triton", CPU), x[t : t + 1], y[t : t + 1], case.grouping([slot]))[0]
        assert torch.equal(alone, together[t])
        assert torch.equal(alone, many[t + 7])


@pytest.mark.parametrize("others", [0, 9])
def test_sums_that_are_shared_out_have_memory_of_their_own(backend, monkeypatch, others):
    """However many tokens of the base model are beside them, and in a frozen instance for more than are ever split: the
    memory was once sized by all tokens, and kernels wrote behind its end."""
    monkeypatch.setattr(launch, "BLOCKING", replace(BLOCKING, split_tokens=4))
    case = make_case(2504, [40], [[(8, 1)], [(4, 2)]])
    frozen = frozen_for(case, 12, max_width=64)

    for one in (backend, frozen):
        step = case.grouping([0, 1, *[-1] * others])
        one.prepare([case.group], step)
        assert one._step.is_split
        assert one._u.numel() >= 3 * one._plane_stride > 0
    assert case.error(resolve_backend("triton", CPU), [0, 1, *[-1] * others]) <= BOUND


def test_rows_without_an_adapter_are_not_touched(backend):
    case = make_case(96, [96, 64], MIXED)
    slots = token_slots(31, len(MIXED))
    x, y, grouping = case.step(slots)
    result = case.apply(backend, x, y, grouping)
    # MIXED has one empty layout: slot 7 has no adapter in the first module, slot 6 none in the second.
    base, first, second = ([t for t, slot in enumerate(slots) if slot == bare] for bare in (-1, 7, 6))

    assert min(map(len, (base, first, second))) > 0
    assert torch.equal(y[base], result[base])
    assert torch.equal(y[first, :96], result[first, :96])
    assert torch.equal(y[second, 96:], result[second, 96:])
    assert torch.equal(y, case.apply(backend, x, y, case.grouping([-1] * 31)))


def test_the_device_writes_the_lists_of_the_specification(monkeypatch):
    """Random steps over layers of several kinds, some of them with ranks of their own, while slots change hands."""
    generator = np.random.default_rng(0)
    tiny = Blocking(
        small_tile=2, full_tile=4, rank_rows=4, columns=16, narrow_columns=8, narrow_tokens=6, depth=16,
        split_tokens=12,
    )  # fmt: skip
    monkeypatch.setattr(launch, "BLOCKING", tiny)
    kinds = [(48, [48, 24, 24]), (48, [96]), (96, [48])]
    groups = [GroupTable(in_features, outs, 12, CPU) for in_features, outs in kinds * 2]
    layouts = [[], [(4, 1)], [(8, 2)], [(6, 3), (5, 1)], [(24, 8)]]

    def load(slot: int) -> None:
        usual = layouts[generator.integers(len(layouts))]
        for group in groups:
            for table in group.modules:
                own = layouts[generator.integers(len(layouts))] if generator.random() < 0.1 else usual
                table.set(slot, [Entry(a_offset=0, b_offset=0, r=r, k=k, scale=1.0) for r, k in own])

    for slot in range(12):
        load(slot)
    backend = resolve_backend("triton", CPU)
    seen = set()
    for step in range(16):
        grouping = make_case(8, 8, [[]] * 12).grouping(generator.integers(-1, 1 + step % 12, generator.integers(1, 40)))
        if step % 2:
            grouping = make_case(8, 8, [[]] * 12).grouping(generator.permutation(12)[: 1 + step % 11])
            load(int(generator.integers(12)))
        backend.prepare(groups, grouping)
        wanted = plan_work(groups, grouping, tiny)
        seen.add((wanted.tile_tokens, wanted.is_split))
        for group, work in zip(groups, wanted.groups, strict=True):
            shrink, expand = backend.lists(group)
            assert np.array_equal(shrink, wanted.items[work.shrink_start :][: work.num_shrink_items])
            assert np.array_equal(expand, wanted.items[work.expand_start :][: work.num_expand_items])
    assert seen == {(1, True), (2, True), (4, False)}


def frozen_for(case, max_tokens, max_width=600, tile_tokens=16):
    return TritonBackend(CPU).frozen(
        [case.group], max_tokens=max_tokens, max_width=max_width, dtype=torch.float32, tile_tokens=tile_tokens
    )


def test_all_that_steps_may_launch_is_compiled_at_start(backend):
    launch.variant_of.cache_clear()

    warm_up_backend(backend, device=CPU, dtype=torch.float32)

    assert launch.variant_of.cache_info().currsize == len(launch.variants(torch.float32))


@pytest.mark.parametrize("slots", [range(600), [0] * 600])
def test_a_frozen_backend_has_small_tiles_however_many_rows_decode(slots):
    frozen = frozen_for(make_case(8, 8, [[(1, 1)]] * 600), 600)

    assert frozen.tile_tokens(make_case(8, 8, [[(1, 1)]] * 600).grouping(slots)) in (1, 16)


def test_a_frozen_backend_has_nothing_to_do_before_its_first_step():
    """Graphs are captured then, and what they launch must not read what memory holds by chance."""
    assert not frozen_for(make_case(96, [96, 64], MIXED[:5]), 8)._words.any()


@pytest.mark.usefixtures("row_by_row_products")
def test_a_frozen_backend_has_the_bits_of_any_other(backend):
    """As a CUDA graph replays it: launches and memory of the largest step, whatever the step, and tiles of 16 tokens
    where others have one."""
    case = make_case(96, [96, 64], MIXED[:5])
    frozen = frozen_for(case, 8)
    memory = [tensor.data_ptr() for tensor in (frozen._u, frozen._words, frozen._items)]

    for slots in ([3, 4, 0, 2, -1, 1], [-1, -1], [4, 3, 4], [0, 1, 2, 3, 4, 0, 1, 2]):
        x, y, step = case.step(slots)
        assert torch.equal(case.apply(backend, x, y, step), case.apply(frozen, x, y, step))
    assert memory == [tensor.data_ptr() for tensor in (frozen._u, frozen._words, frozen._items)]


@pytest.mark.usefixtures("row_by_row_products")
@pytest.mark.parametrize("tile_tokens", [1, 16])
def test_more_rows_than_the_step_has_are_left_alone(backend, tile_tokens):
    """A step is padded to the rows of its graph: those hold what an earlier step left there."""
    case = make_case(96, [96, 64], MIXED[:5])
    frozen = frozen_for(case, 8, tile_tokens=tile_tokens)
    x, y, step = case.step([3, 4, 4])
    padded_x, padded_y = torch.full((8, 96), torch.nan), torch.full((8, 160), torch.nan)
    padded_x[:3], padded_y[:3] = x, y

    frozen.prepare([case.group], step)
    frozen.shrink(padded_x, case.arena, case.group)
    frozen.expand(padded_y, case.arena, case.group)

    assert torch.equal(padded_y[:3], case.apply(backend, x, y, step))
    assert padded_y[3:].isnan().all()


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        ([0] * 9, "needs tokens 9, but the graph was captured with 8"),
        ([4, 0], "needs columns of u 544, but the graph was captured with 128"),
        ([0, 0], "needs tokens per tile 16, but the graph was captured with 1"),
    ],
)
def test_a_frozen_backend_refuses_what_its_graph_does_not_compute(slots, message):
    case = make_case(96, [96, 64], [*MIXED[:4], [(64, 8)]])

    with pytest.raises(ReplayError, match=message):
        frozen_for(case, 8, max_width=64, tile_tokens=1).prepare([case.group], case.grouping(slots))
