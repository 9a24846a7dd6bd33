"""The exact LoRA of a GraLoRA, and the adapters that are measured with."""

from __future__ import annotations

import json

import pytest
import torch
from support.tiny_models import tiny_model
from transformers import PreTrainedModel

from benchmarks.adapters import AdapterSet, Merger, exact_lora, write_exact_lora


@pytest.fixture(scope="module")
def base() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.mark.parametrize("k", [1, 2, 4, 8])
def test_the_exact_lora_merges_to_the_same_weights(base, tmp_path, k):
    """Both merged by PEFT, which knows nothing of the conversion."""
    adapters = AdapterSet(tmp_path)
    (name,) = adapters.add_gralora(base, 1, rank=16, k=k)
    (converted,) = adapters.add_exact_lora([name])
    merger = Merger(base)

    expected = merger.keep(adapters.path(name)).state_dict()
    merged = merger.keep(adapters.path(converted)).state_dict()

    assert expected.keys() == merged.keys()
    for key, weight in expected.items():
        torch.testing.assert_close(weight, merged[key], rtol=0, atol=1e-6)
    assert k * adapters.params[name] == adapters.params[converted]
    assert {converted: name} == adapters.same_as


def test_the_exact_lora_of_unequal_widths():
    """in and out differ, so that a transposed block would show."""
    k, s, width_in, width_out = 3, 2, 5, 7
    rank = k * s
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(k, width_in, rank, generator=generator)
    b = torch.randn(k, rank, width_out, generator=generator)
    x = torch.randn(4, k * width_in, generator=generator)

    u = torch.einsum("tni,nip->tnp", x.view(4, k, width_in), a).view(4, k, k, s)  # [t, n, j, c]
    v = u.transpose(1, 2).reshape(4, k, rank)  # [t, j, n*s + c]
    expected = torch.einsum("tjp,jpo->tjo", v, b).reshape(4, k * width_out)
    lora_a, lora_b = exact_lora(a, b)

    torch.testing.assert_close(expected, x @ lora_a.T @ lora_b.T)


def test_a_hybrid_is_not_converted(base, tmp_path):
    adapters = AdapterSet(tmp_path)
    (name,) = adapters.add_gralora(base, 1, rank=4, k=2)
    path = adapters.path(name) / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hybrid_r": 2}))

    with pytest.raises(ValueError, match="hybrid_r is 2"):
        write_exact_lora(adapters.path(name), tmp_path / "lora")


def test_a_borrowed_merged_model_holds_one_adapter_only(base, tmp_path):
    """They share memory: what the one before left behind would make the gate compare with the wrong weights."""
    adapters = AdapterSet(tmp_path)
    first, second = adapters.add_gralora(base, 2, rank=4, k=2)
    before = {key: weight.clone() for key, weight in base.state_dict().items()}
    merger = Merger(base)
    expected = merger.keep(adapters.path(second)).state_dict()

    merger.borrow(adapters.path(first))
    borrowed = merger.borrow(adapters.path(second)).state_dict()

    assert all(torch.equal(weight, borrowed[key]) for key, weight in expected.items())
    assert any(not torch.equal(weight, borrowed[key]) for key, weight in before.items())
    assert all(torch.equal(weight, base.state_dict()[key]) for key, weight in before.items())
