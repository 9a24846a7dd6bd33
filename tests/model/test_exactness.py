"""The served model against PEFT's: same logits for every architecture and adapter kind that we claim."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support.device import ON_GPU
from support.served import PROMPT, WITHOUT_PROGRAM, Served, check_against_peft, serving
from support.tiny_models import ARCHITECTURES

from gralora_runtime.model.programs.transformers.runner import TransformersRunner


@pytest.fixture(scope="module", params=ARCHITECTURES)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp(request.param)
    with serving(request.param, folder / "model", folder / "adapters") as served:
        yield served


def test_all_but_few_have_a_program_of_their_own(served: Served) -> None:
    is_slow = isinstance(served.parts.runner, TransformersRunner)

    assert is_slow == (served.architecture in WITHOUT_PROGRAM)


@pytest.mark.parametrize("chunk", [64, 7, 1], ids=["one-chunk", "chunks-of-7", "token-by-token"])
def test_all_adapters_in_one_batch_have_pefts_logits(served: Served, chunk: int) -> None:
    check_against_peft(served, chunk)


def test_a_base_row_is_bit_identical_beside_every_occupied_slot(served: Served) -> None:
    """vLLM's CPU path once gave a base-model row the adapter of the last slot when all slots were taken."""
    names = [info.name for info in served.parts.adapters.list()]
    base_lease = served.parts.adapters.acquire("").result()
    alone = served.logits([(base_lease, PROMPT)] * (len(names) + 1), 64)[0]
    leases = [served.parts.adapters.acquire(name).result(30) for name in names]
    try:
        beside = served.logits([(base_lease, PROMPT), *((lease, PROMPT) for lease in leases)], 64)[0]
    finally:
        for lease in leases:
            served.parts.adapters.release(lease)

    assert torch.equal(alone, beside)


def test_logits_are_bit_identical_whatever_shares_the_batch_and_however_the_prompt_is_cut(served: Served) -> None:
    """Alone, among all adapters, and in chunks of any size: every product has one order of summation."""
    if ON_GPU and served.architecture in WITHOUT_PROGRAM:
        pytest.skip("a GPU's own products sum in another order for another number of tokens")
    names = ["", *(info.name for info in served.parts.adapters.list())]
    leases = [served.parts.adapters.acquire(name).result(30) for name in names]
    try:
        together = served.logits([(lease, PROMPT) for lease in leases], 64)
        in_chunks = served.logits([(lease, PROMPT) for lease in leases], 7)
        alone = [
            served.logits([(lease, PROMPT)], chunk)[0] for lease, chunk in zip(leases, [64, 1, 5] * 99, strict=False)
        ]
    finally:
        for lease in leases:
            served.parts.adapters.release(lease)

    for name, one, two, three in zip(names, together, in_chunks, alone, strict=True):
        assert torch.equal(one, two), f"{name}: chunks change it"
        assert torch.equal(one, three), f"{name}: neighbours change it"
