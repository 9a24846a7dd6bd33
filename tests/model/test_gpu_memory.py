"""What a GPU's pools leave to the program: enough for its largest tensors, and not much more."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from gralora_runtime.model.description import describe

pytest.importorskip("triton")

from gralora_runtime.model.programs.gpu.memory import workspace_bytes

LLAMA_3_8B = LlamaConfig(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=2, num_attention_heads=32,
    num_key_value_heads=8,
)  # fmt: skip


def test_an_8b_model_needs_about_a_gigabyte_beside_its_weights_and_pools():
    with torch.device("meta"):
        model = describe(AutoModelForCausalLM.from_config(LLAMA_3_8B, dtype=torch.bfloat16))

    without = workspace_bytes(model, max_tokens=2048, max_rows=128, num_rungs=0)
    with_graphs = workspace_bytes(model, max_tokens=2048, max_rows=128, num_rungs=15)

    logits, feed_forward = 128 * 128256 * (2 + 4), 2048 * 3 * 14336 * 2
    assert logits + feed_forward < without < with_graphs < 1 << 30
