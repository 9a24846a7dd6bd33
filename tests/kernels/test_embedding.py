"""Adapters on an embedding: the reference against a whole matrix of rows, and the cpu backend against the reference."""

from __future__ import annotations

import pytest
import torch
from support.embedding_cases import FACTOR, SLOTS, VOCAB, embedding_case, expected, looked_up
from support.kernel_cases import token_slots

from gralora_kernels.alignment import map_numel
from gralora_kernels.cpu.backend import CpuBackend
from gralora_kernels.tables import DTYPES

HIDDEN = (64, 40, 416, 24)


@pytest.mark.parametrize("slot", range(len(SLOTS)))
def test_the_reference_is_a_row_of_the_whole_changed_matrix(slot: int) -> None:
    case = embedding_case(40)
    ids = torch.arange(VOCAB)
    arena, table = case.arena, case.table
    weight = looked_up(case, CpuBackend(), [-1] * VOCAB, ids) / FACTOR
    if at := int(table.host_affine[slot]):
        start = at - 1 + map_numel(VOCAB, 4)
        for token, row in enumerate(arena[at - 1 :].view(torch.int32)[:VOCAB].tolist()):
            if row:
                weight[token] = arena[start + (row - 1) * 40 :][:40]
    for (a, b, r, _), scale, storage in zip(
        table.host_index[slot].tolist(), table.host_scale[slot], table.host_storage[slot], strict=True
    ):
        pair = [arena[offset:].view(DTYPES.get(storage, torch.float32))[: r * n].float() for offset, n in
                ((a, VOCAB), (b, 40))]  # fmt: skip
        if r:
            weight += float(scale) * pair[0].view(r, VOCAB).T @ pair[1].view(r, 40)

    torch.testing.assert_close(expected(case, [slot] * VOCAB, ids), FACTOR * weight)


@pytest.mark.parametrize("num_tokens", [1, 7, 97])
@pytest.mark.parametrize("hidden", HIDDEN)
def test_the_cpu_backend_agrees_with_the_reference(hidden: int, num_tokens: int) -> None:
    case = embedding_case(hidden)
    slots = [6, *token_slots(num_tokens - 1, len(SLOTS), seed=num_tokens)]
    ids = torch.randint(0, VOCAB, (num_tokens,), generator=torch.Generator().manual_seed(num_tokens))

    torch.testing.assert_close(looked_up(case, CpuBackend(), slots, ids), expected(case, slots, ids))


def test_a_token_s_row_depends_on_nobody_and_the_base_model_s_is_not_touched() -> None:
    case = embedding_case(416)
    ids = torch.arange(VOCAB)
    base = looked_up(case, CpuBackend(), [-1] * VOCAB, ids)
    slots = token_slots(VOCAB, len(SLOTS))
    together = looked_up(case, CpuBackend(), slots, ids)

    for token, slot in enumerate(slots):
        alone = looked_up(case, CpuBackend(), [slot], ids[token : token + 1])
        assert torch.equal(together[token], alone[0])
        assert slot >= 0 or torch.equal(together[token], base[token])
