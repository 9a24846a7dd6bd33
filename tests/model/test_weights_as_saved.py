"""Weights of 16 bits stay so in memory, and change no bit of what is computed."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize
from support.device import ON_GPU
from support.peft_adapters import gralora_config, lora_config, save_adapter
from support.served import CONFIG, PROMPT, Served
from support.tiny_models import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

from gralora_runtime.assemble import assemble
from gralora_runtime.config import in_directory
from gralora_runtime.model.programs.cpu import CpuRunner

pytestmark = pytest.mark.skipif(ON_GPU, reason="what a CPU keeps")


@contextmanager
def serving(folder: Path, architecture: str, weights: str) -> Iterator[Served]:
    parts = assemble(
        replace(CONFIG, model=folder / "model", adapters=in_directory(folder / "adapters"), weights=weights)
    )
    yield Served(parts, folder / "model", folder / "adapters", architecture)
    parts.adapters.close()


def saved(folder: Path, architecture: str, dtype: torch.dtype) -> Path:
    model = tiny_model(architecture)
    save_adapter(model, gralora_config(architecture, 8, 2), folder / "adapters" / "gralora")
    save_adapter(model, lora_config(architecture, 5), folder / "adapters" / "lora")
    model.to(dtype).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    return folder


def logits(served: Served) -> list[torch.Tensor]:
    leases = [served.parts.adapters.acquire(name).result(30) for name in ("", "gralora", "lora")]
    try:
        return served.logits([(lease, PROMPT[: 20 - i]) for i, lease in enumerate(leases)], 7)
    finally:
        for lease in leases:
            served.parts.adapters.release(lease)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("architecture", ["llama", "phi3", "gemma3", "gpt2"])
def test_no_bit_of_the_logits_changes(architecture: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = saved(tmp_path, architecture, dtype)
    with serving(folder, architecture, "as-saved") as small, serving(folder, architecture, "float32") as large:
        pairs = list(zip(logits(small), logits(large), strict=True))

    for narrow, wide in pairs:
        assert torch.equal(narrow, wide)


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
def test_no_bit_changes_where_weights_are_blocks(architecture: str, tmp_path: Path) -> None:
    """Embeddings of 8 bits, all else of 4, as the default model has them."""
    folder = saved(tmp_path, architecture, torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                kind = Kind.Q8_0 if "embed" in name or "wte" in name else Kind.Q4_1
                parameter.copy_(torch.from_numpy(dequantize(quantize(parameter.numpy(), kind), kind).copy()))
    model.save_pretrained(folder / "model")
    with serving(folder, architecture, "as-saved") as small, serving(folder, architecture, "float32") as large:
        pairs = list(zip(logits(small), logits(large), strict=True))
        if isinstance(small.parts.runner, CpuRunner):
            assert isinstance(large.parts.runner, CpuRunner)
            assert small.parts.runner.weight_bytes < 0.25 * large.parts.runner.weight_bytes

    for narrow, wide in pairs:
        assert torch.equal(narrow, wide)


@pytest.mark.parametrize("weights", ["as-saved", "float32"])
def test_a_program_keeps_nothing_of_the_model_but_its_own(
    weights: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And says in what."""
    caplog.set_level("INFO", "gralora_runtime")
    before = fp32_matrices()
    with serving(saved(tmp_path, "llama", torch.bfloat16), "llama", weights) as served:
        assert isinstance(served.parts.runner, CpuRunner)
        linears = [module for module in served.parts.base.model.modules() if isinstance(module, torch.nn.Linear)]
        left = fp32_matrices() - before

    assert linears
    assert all(linear.weight.numel() == 0 for linear in linears)
    assert served.parts.base.model.get_input_embeddings().weight.numel() == 0
    assert "weights in 0 MiB" in caplog.text
    assert (left == 0) == (weights == "as-saved")


def fp32_matrices() -> int:
    """How many tensors of the tiny model's vocabulary there are: its embeddings, and panels of its head."""
    gc.collect()
    vocab, hidden = 320, 64
    shapes = [(vocab, hidden), (vocab // 16, hidden, 16), (vocab // 32, hidden, 32)]
    return sum(
        type(one) in (torch.Tensor, torch.nn.Parameter) and one.dtype is torch.float32 and tuple(one.shape) in shapes
        for one in gc.get_objects()
    )
