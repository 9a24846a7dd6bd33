"""Adapters with more tokens than the base model: PEFT's logits, and nobody else is ever given one of those tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.larger import NEW, larger_configs, peft_logits, peft_model, save_larger
from support.peft_adapters import lora_config
from support.served import MAX_DIFFERENCE, PROMPT, Served, replacing_configs, serving
from support.tiny_models import VOCAB_SIZE

from gralora_kernels.cpu.program import Program, Step
from gralora_runtime.adapters.residency.lease import AdapterLease

# With tied ends, and without; soft caps; scaled rows and logits; norms that centre; then transformers' forward pass.
MODELS = ("llama", "llama, tied", "qwen3", "gemma, tied", "gemma2", "granite, tied", "cohere2", "opt", "opt, tied")
WITH_NEW = [*PROMPT[:9], NEW[1], *PROMPT[9:], NEW[2], NEW[0]]


@pytest.fixture(scope="module", params=MODELS)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """All of them, and others that replace something, or nothing."""
    architecture, tied = request.param.partition(",")[0], request.param.endswith("tied")
    folder = tmp_path_factory.mktemp("served")
    for seed, (name, config) in enumerate(larger_configs(architecture, tied=tied).items()):
        save_larger(architecture, config, folder / "adapters" / name, tied=tied, seed=seed)
    configs = replacing_configs(architecture)
    with serving(architecture, folder / "model", folder / "adapters", configs=configs, tied=tied) as served:
        yield served


def _leases(served: Served) -> dict[str, AdapterLease]:
    names = ["", *(info.name for info in served.parts.adapters.list())]
    return {name: served.parts.adapters.acquire(name).result(60) for name in names}


def _release(served: Served, leases: dict[str, AdapterLease]) -> None:
    for lease in leases.values():
        served.parts.adapters.release(lease)


def _rows(leases: dict[str, AdapterLease]) -> list[tuple[AdapterLease, list[int]]]:
    return [(lease, WITH_NEW if name.startswith("larger") else PROMPT) for name, lease in leases.items()]


@pytest.mark.parametrize("chunk", [64, 7, 1], ids=["one-chunk", "chunks-of-7", "token-by-token"])
def test_all_in_one_batch_have_pefts_logits(served: Served, chunk: int) -> None:
    leases = _leases(served)
    try:
        found = dict(zip(leases, served.logits(_rows(leases), chunk), strict=True))
    finally:
        _release(served, leases)

    larger = [name for name in leases if name.startswith("larger")]
    assert larger
    for name in larger:
        expected = peft_logits(peft_model(served.architecture, served.adapters_dir / name, tied=served.tied), WITH_NEW)
        difference = (found[name] - expected).abs().max().item()
        assert difference <= MAX_DIFFERENCE, f"{name}: logits differ by {difference:.2g}"
    for name in leases.keys() - set(larger):
        assert (found[name][VOCAB_SIZE:] == -torch.inf).all(), name


def test_bits_depend_on_no_neighbour_and_on_no_chunks(served: Served) -> None:
    leases = _leases(served)
    try:
        together = served.logits(_rows(leases), 64)
        in_chunks = served.logits(_rows(leases), 7)
        alone = [served.logits([row], 64)[0] for row in _rows(leases)]
    finally:
        _release(served, leases)

    for name, one, two, three in zip(leases, together, in_chunks, alone, strict=True):
        width = VOCAB_SIZE + leases[name].added_tokens
        assert len(three) == width, name
        assert torch.equal(one[:width], two[:width]), f"{name}: chunks change it"
        assert torch.equal(one[:width], three), f"{name}: neighbours change it"


def test_vocabularies_of_several_sizes_are_each_hidden_from_the_others(tmp_path: Path) -> None:
    config = lora_config("llama", 4, modules_to_save=["embed_tokens", "lm_head"], target_modules=["q_proj"])
    for added in (1, 5, 2):
        save_larger("llama", config, tmp_path / "adapters" / f"with-{added}", added=added)
    with serving("llama", tmp_path / "model", tmp_path / "adapters", configs={"plain": config}) as served:
        leases = _leases(served)
        found = served.logits([(lease, PROMPT) for lease in leases.values()], 64)
        _release(served, leases)

        for (name, lease), logits in zip(leases.items(), found, strict=True):
            assert len(logits) == VOCAB_SIZE + 5
            assert logits.isfinite().sum() == VOCAB_SIZE + lease.added_tokens, name
        assert sorted(lease.added_tokens for lease in leases.values()) == [0, 0, 1, 2, 5]


def test_who_comes_into_a_slot_has_none_of_the_tokens_of_who_was_there(tmp_path: Path) -> None:
    configs = larger_configs("llama", tied=False)
    for name, config in configs.items():
        save_larger("llama", config, tmp_path / "adapters" / name)
    plain = {"plain": lora_config("llama", 5)}
    with serving("llama", tmp_path / "model", tmp_path / "adapters", configs=plain, max_adapter_slots=1) as served:

        def logits_of(name: str) -> torch.Tensor:
            lease = served.parts.adapters.acquire(name).result(30)
            try:
                return served.logits([(lease, WITH_NEW if name in configs else PROMPT)], 64)[0]
            finally:
                served.parts.adapters.release(lease)

        names = ["plain", *configs]
        first = {name: logits_of(name) for name in names}
        for name in [*reversed(names), "plain", *configs]:
            assert torch.equal(logits_of(name), first[name]), name


def test_the_program_is_never_asked_for_a_row_that_the_base_model_does_not_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would read what lies behind them."""
    seen: list[int] = []
    run = Program.run

    def watched(program: Program, step: Step, *more: Any) -> torch.Tensor:
        seen.extend(step.token_ids.tolist())
        return run(program, step, *more)

    monkeypatch.setattr(Program, "run", watched)
    config = larger_configs("llama", tied=False)["larger-saved"]
    save_larger("llama", config, tmp_path / "adapters" / "larger")
    plain = {"plain": lora_config("llama", 5)}
    with serving("llama", tmp_path / "model", tmp_path / "adapters", configs=plain) as served:
        leases = _leases(served)
        served.logits([(leases["larger"], WITH_NEW), (leases[""], PROMPT)], 7)
        _release(served, leases)

    assert set(PROMPT) <= set(seen)
    assert max(seen) < VOCAB_SIZE
