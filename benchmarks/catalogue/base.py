"""The base model of these benchmarks: the default one, or a tiny one that is made up where only correctness counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from gralora_runtime.adapters.checkpoint.spec import ModuleShape
from gralora_server.loadtest.headers import weight_shapes

LAYERS = (0, 1)  # few, so that thousands of adapters are a gigabyte; the first, so that all that follows differs
PARTS = ("self_attn.q_proj", "self_attn.v_proj")
TINY_VOCAB = 320


@dataclass(frozen=True, slots=True)
class Base:
    """A model directory, and what adapters may change in it."""

    name: str
    path: Path
    vocab_size: int
    modules: Sequence[ModuleShape]
    targets: Mapping[str, tuple[int, int]]  # module -> (out, in), of the catalogue's adapters


def base_of(name: str, path: Path) -> Base:
    shapes = {key.removesuffix(".weight"): shape for key, shape in weight_shapes(path).items() if len(shape) == 2}
    vocab_size = shapes["model.embed_tokens"][0]
    linear = {name: (shape[0], shape[1]) for name, shape in shapes.items() if name.endswith("_proj")}
    wanted = [f"model.layers.{layer}.{part}" for layer in LAYERS for part in PARTS]
    return Base(
        name=name,
        path=path,
        vocab_size=vocab_size,
        modules=[ModuleShape(module, inputs, outputs) for module, (outputs, inputs) in linear.items()],
        targets={module: linear[module] for module in wanted},
    )


def save_tiny_llama(folder: Path) -> Path:
    """Random weights, large enough that tokens differ; a tokenizer of made-up words."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=TINY_VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=False,
        bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(0.0, 0.5 if "embed" in name else 0.15)
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(TINY_VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="w0", eos_token="w1", pad_token="w2")
    fast.save_pretrained(folder)
    return folder
