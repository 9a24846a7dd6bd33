"""The cpu backend against the reference, and what it promises beyond being right."""

from __future__ import annotations

import pytest
import torch
from support.kernel_cases import MIXED, make_case, token_slots
from support.numeric import BOUNDS

from gralora_kernels.cpu import backend as cpu_backend
from gralora_kernels.cpu.backend import CpuBackend
from gralora_kernels.tables import Storage

BOUND = BOUNDS[torch.float32]
RANKS_AND_KS = [(r, k) for r in (1, 2, 3, 8, 12, 64) for k in (1, 2, 4, 8) if r % k == 0]
WIDTHS = [(576, 1536), (1536, 576), (192, 72 * 8), (72 * 8, 192), (40, 24)]  # 40 / 8 = 5: narrower than any vector


@pytest.fixture(params=[0, 10**9], ids=["parallel", "serial"])
def backend(request, monkeypatch):
    monkeypatch.setattr(cpu_backend, "SERIAL_WORK", request.param)
    return CpuBackend()


@pytest.mark.parametrize(("r", "k"), RANKS_AND_KS)
@pytest.mark.parametrize(("in_features", "out_features"), WIDTHS)
def test_agrees_with_the_reference(backend, in_features, out_features, r, k):
    case = make_case(in_features, out_features, [[(r, k)], [(r, k), (5, 1)]])

    assert case.error(backend, [0, -1, 1, 0, 0, 1, 1]) <= BOUND


@pytest.mark.parametrize("num_tokens", [1, 7, 31, 33, 97])
@pytest.mark.parametrize(("in_features", "out_features"), WIDTHS)
def test_mixed_adapters_side_by_side(backend, in_features, out_features, num_tokens):
    case = make_case(in_features, out_features, MIXED)

    slots = token_slots(num_tokens, len(MIXED), seed=num_tokens)
    slots[0] = 3  # at least one that has an adapter

    assert case.error(backend, slots) <= BOUND


@pytest.mark.parametrize("outs", [(576, 192, 192), (1536, 1536), (8, 40, 16)], ids=["q-k-v", "gate-up", "narrow"])
def test_several_modules_side_by_side(backend, outs):
    case = make_case(576, outs, MIXED)

    assert case.error(backend, [3, *token_slots(41, len(MIXED))]) <= BOUND


def test_thirty_three_adapters_in_one_batch(backend):
    case = make_case(576, 192, [MIXED[i % 7] for i in range(33)])

    assert case.error(backend, [*range(33), *range(0, 33, 2)]) <= BOUND


@pytest.mark.parametrize("num_tokens", [1, 7, 33, 97])
@pytest.mark.parametrize(("in_features", "outs"), [(576, (576, 192)), (192, (1536,)), (40, (24, 8, 40))])
def test_weights_of_16_bits_give_what_they_give_in_32(backend, in_features, outs, num_tokens):
    """Bit for bit, adapters of all three storages side by side: widening is exact, and sums have one order."""
    layouts = [*MIXED, [(24, 4)], [(7, 1)], [(20, 4), (9, 1)]]
    storages = (Storage.FLOAT16, Storage.BFLOAT16, Storage.NATIVE)
    narrow = make_case(in_features, outs, layouts, storages=storages)
    wide = make_case(in_features, outs, layouts, storages=storages, widened=True)
    x, y, grouping = narrow.step([3, *token_slots(num_tokens, len(layouts))])

    result = narrow.apply(backend, x, y, grouping)

    assert narrow.arena.numel() < 0.8 * wide.arena.numel()
    assert torch.equal(result, wide.apply(backend, x, y, grouping))
    assert narrow.error(backend, [3, *token_slots(num_tokens, len(layouts))]) <= BOUND


@pytest.mark.parametrize("outs", [(576, 192), (40, 24)], ids=str)
def test_gains_without_matrices(backend, outs):
    case = make_case(64, outs, [[], [(4, 2)], []])

    assert case.error(backend, [0, 1, 2, -1, *[0] * 40]) <= BOUND


def test_base_model_rows_are_untouched_bit_for_bit(backend):
    """Also after a step that left every slot's metadata behind, and beside rows of other adapters."""
    case = make_case(576, 192, MIXED)
    x, y, before = case.step([0, 1, 2, 3, 4, 5, 6, 7])
    case.apply(backend, x, y, before)
    before.fill([-1] * 8, {-1: 0})

    assert torch.equal(y, case.apply(backend, x, y, before))

    slots = token_slots(97, len(MIXED))
    x, y, grouping = case.step(slots)
    base = [t for t, slot in enumerate(slots) if slot in (-1, 7)]  # slot 7 has no adapter in this module
    assert len(base) > 5

    assert torch.equal(y[base], case.apply(backend, x, y, grouping)[base])


def test_a_tokens_result_does_not_depend_on_its_batch():
    """Bit-identical alone, beside others, in another order, and on either path."""
    case = make_case(576, 1536, MIXED)
    slots = [*token_slots(97, 7), *[4] * 40]  # slot 4 fills more than one tile
    x, y, grouping = case.step(slots)
    backend = CpuBackend()

    together = case.apply(backend, x, y, grouping)

    for token in range(0, len(slots), 5):
        alone = case.apply(backend, x[token : token + 1], y[token : token + 1], case.grouping([slots[token]]))
        assert torch.equal(together[token], alone[0])
    order = torch.randperm(len(slots), generator=torch.Generator().manual_seed(3))
    shuffled = case.apply(backend, x[order], y[order], case.grouping([slots[i] for i in order]))
    assert torch.equal(together[order], shuffled)


@pytest.mark.parametrize("width", [576, 72 * 8, 40])  # whole panels, a part at the end of each block, less than one
def test_a_tokens_result_does_not_depend_on_how_many_its_adapter_has(width):
    """Bit-identical for each number of tokens, up to more than a tile: each cuts them into other pieces."""
    storages = (Storage.FLOAT16, Storage.BFLOAT16, Storage.NATIVE)
    case = make_case(576, width, [[(16, 2)], [(24, 8), (5, 1)], [(7, 1)]], storages=storages)
    backend = CpuBackend()
    for slot in range(3):
        x, y, grouping = case.step([slot] * 34)
        alone = torch.cat([case.apply(backend, x[[t]], y[[t]], case.grouping([slot])) for t in range(34)])

        assert torch.equal(case.apply(backend, x, y, grouping), alone)
        for count in range(1, 34):
            few = case.apply(backend, x[:count], y[:count], case.grouping([slot] * count))
            assert torch.equal(few, alone[:count]), f"{count} tokens of slot {slot}"


def test_a_larger_step_after_a_smaller_one_is_right():
    """The intermediate u grows with the step."""
    case = make_case(192, 192, MIXED)
    backend = CpuBackend()

    assert case.error(backend, [5]) <= BOUND
    assert case.error(backend, [4] * 64) <= BOUND


def test_a_step_of_very_many_tokens_is_right():
    """More than any table of row numbers is made for in advance."""
    case = make_case(8, 8, [[(2, 2)], [(1, 1)]])

    assert case.error(CpuBackend(), [0] * 40_000 + [1] * 30_000) <= BOUND


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda x: x.to(torch.bfloat16), id="dtype"),
        pytest.param(lambda x: x[:, :-1], id="width"),
        pytest.param(lambda x: x.T.contiguous().T, id="strides"),
    ],
)
def test_a_tensor_that_it_would_misread_is_refused(spoil):
    case = make_case(64, 64, [[(4, 2)]])
    x, y, grouping = case.step([0, 0, 0])

    with pytest.raises(ValueError, match="the cpu backend needs contiguous float32"):
        CpuBackend().apply(y, spoil(x), case.arena, case.group, grouping)
