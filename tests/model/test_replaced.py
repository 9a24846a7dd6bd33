"""Adapters that bring whole weights, or change the embedding: PEFT's logits, and nobody else's are touched."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.peft_adapters import lora_config
from support.served import MIXTURES, PROMPT, Served, check_against_peft, replacing_configs, serving

TIED = "llama, tied"
# Norms of one head; soft caps and scaled rows; scaled logits; norms that centre; of whole heads; with biases; then
# transformers' forward pass.
ARCHITECTURES = ("qwen3", "gemma2", "granite", "cohere2", "olmo2", "stablelm", TIED, "gpt2", "opt", "qwen3-moe")
TYING = {
    "tied-ends": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "tied-twice": {"trainable_token_indices": {"embed_tokens": [5, 99], "lm_head": [5, 99]}},
    "untied-tokens": {"trainable_token_indices": {"embed_tokens": [5, 99], "lm_head": [180]}},
}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    architecture = request.param.partition(",")[0]
    configs = replacing_configs(architecture)
    if request.param == TIED:
        configs |= {name: lora_config("llama", 2, target_modules=["q_proj"], **keys) for name, keys in TYING.items()}
    folder = tmp_path_factory.mktemp("served")
    with serving(
        architecture, folder / "model", folder / "adapters", configs=configs, tied=request.param == TIED
    ) as served:
        yield served


@pytest.mark.parametrize("chunk", [64, 7, 1], ids=["one-chunk", "chunks-of-7", "token-by-token"])
def test_all_in_one_batch_have_pefts_logits(served: Served, chunk: int) -> None:
    check_against_peft(served, chunk)


def test_bits_depend_on_no_neighbour_and_on_no_chunks(served: Served) -> None:
    """The base model's and the plain adapter's neither."""
    if served.architecture in MIXTURES:
        pytest.skip("torch sums an expert's product in another order for another number of tokens")
    names = ["", *(info.name for info in served.parts.adapters.list())]
    leases = [served.parts.adapters.acquire(name).result(30) for name in names]
    try:
        together = served.logits([(lease, PROMPT) for lease in leases], 64)
        in_chunks = served.logits([(lease, PROMPT) for lease in leases], 7)
        alone = [served.logits([(lease, PROMPT)], 64)[0] for lease in leases]
    finally:
        for lease in leases:
            served.parts.adapters.release(lease)

    for name, one, two, three in zip(names, together, in_chunks, alone, strict=True):
        assert torch.equal(one, two), f"{name}: chunks change it"
        assert torch.equal(one, three), f"{name}: neighbours change it"


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_who_comes_into_a_slot_has_nothing_of_who_was_there(architecture: str, tmp_path: Path) -> None:
    """One slot, through which all go in turn: rows, weights of norms and heads leave with their adapter."""
    configs = replacing_configs(architecture)
    with serving(
        architecture, tmp_path / "model", tmp_path / "adapters", configs=configs, max_adapter_slots=1
    ) as served:
        adapters = served.parts.adapters

        def logits_of(name: str) -> torch.Tensor:
            lease = adapters.acquire(name).result(30)
            try:
                return served.logits([(lease, PROMPT)], 64)[0]
            finally:
                adapters.release(lease)

        first = {name: logits_of(name) for name in ["", *configs]}
        for name in ["plain", *reversed(configs), "", *configs, "plain"]:
            assert torch.equal(logits_of(name), first[name]), name
