"""Engines over random weights of real models' shapes, with adapters of any kind in their pools. No hub needed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from benchmarks.gpu_check.clock import device
from gralora_kernels.alignment import ALIGNMENT
from gralora_kernels.tables import Entry
from gralora_runtime.assemble import assemble
from gralora_runtime.config import EngineConfig
from gralora_runtime.model.kv_pool import kv_shape
from gralora_runtime.model.loading import BaseModel
from gralora_runtime.model.programs.gpu.runner import GpuRunner
from gralora_runtime.plan import AdapterUse, RowPlan, StepPlan

Kind = tuple[int, int]  # r, k

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 40960,
    },
    "smollm2-135m": {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024,
    },
}  # fmt: skip


def random_model(shape: str, dtype: torch.dtype) -> PreTrainedModel:
    """On the device. Weights are small, as trained ones are, and norms are one."""
    generator = torch.Generator(device()).manual_seed(0)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPES[shape]), dtype=dtype)
    model = model.to_empty(device=device()).eval()
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config).to(device())
    model.tie_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.1 if shape == "tiny" else 0.02, generator=generator)
            else:
                parameter.fill_(1)
    found: PreTrainedModel = model
    return found


def base_of(model: PreTrainedModel) -> BaseModel:
    """As if it had been read from a directory."""
    config = model.config
    words = {f"w{number}": number for number in range(config.vocab_size)}
    return BaseModel(
        model=model,
        chat_tokenizer=None,
        tokenizer=Tokenizer(WordLevel(words, unk_token="w0")),
        eos_token_ids=frozenset({1}),
        name="random",
        digest="0",
        max_positions=config.max_position_embeddings,
        **kv_shape(config),
    )


class CheckedEngine:
    """One engine, asked for steps."""

    def __init__(self, shape: str, dtype: torch.dtype, **settings: Any) -> None:
        self.model = random_model(shape, dtype)
        self.weight_bytes = sum(p.numel() * p.element_size() for p in self.model.parameters())
        if not self.model.config.tie_word_embeddings:  # of the embedding a step reads a row a token
            self.weight_bytes -= self.model.get_input_embeddings().weight.nbytes
        self.head_bytes = self.model.get_output_embeddings().weight.nbytes
        config = EngineConfig(
            model=Path(), device=device().type, dtype=str(dtype).removeprefix("torch."), kernel_backend="triton",
            **settings,
        )  # fmt: skip
        self.parts = assemble(config, base_of(self.model))
        self.runner, self.batch = self.parts.runner, self.parts.engine.batch
        self.page_size = config.page_size
        self.num_pages = self.parts.info.num_pages
        self.vocab_size: int = self.model.config.vocab_size

    def fitting(self, kinds: Sequence[Kind]) -> list[Kind]:
        """As many of them, from the first on, as the pool holds."""
        pool = self.parts.adapters.pool
        ends = np.cumsum([self.adapter_numel(kind) for kind in kinds])
        return list(kinds[: int(np.searchsorted(ends, pool.arena.numel(), side="right"))])

    def adapter_numel(self, kind: Kind) -> int:
        """Elements of one on all modules."""
        tables = self.parts.adapters.pool.table_set.modules
        return sum(_padded(kind[0] * table.in_features) + _padded(kind[0] * table.out_features) for table in tables)

    def fill(self, kinds: Sequence[Kind]) -> list[int]:
        """Random adapters in slots 0, 1, ..., behind the pool's back; returns the bytes of each."""
        pool = self.parts.adapters.pool
        size, sizes = 0, []
        for slot, (r, k) in enumerate(kinds):
            begin = size
            entries = {}
            for position, table in enumerate(pool.table_set.modules):
                a_offset, size = size, size + _padded(r * table.in_features)
                b_offset, size = size, size + _padded(r * table.out_features)
                entries[position] = [Entry(a_offset=a_offset, b_offset=b_offset, r=r, k=k, scale=0.5)]
            pool.table_set.write(slot, entries)
            sizes.append((size - begin) * pool.arena.element_size())
        if size > pool.arena.numel():
            raise ValueError(f"{len(kinds)} adapters take {size} elements, the pool has {pool.arena.numel()}")
        rows = pool.table_set.rows
        rows.index.copy_(torch.from_numpy(rows.host_index))
        rows.scale.copy_(torch.from_numpy(rows.host_scale))
        pool.arena[:size].normal_(0, 0.02)
        return sizes

    def fill_past(self) -> None:
        """Keys and values as if there had been steps before."""
        for layer in self.gpu_runner.model.layers:
            layer.keys.normal_()
            layer.values.normal_()

    def plan(self, slots: Sequence[int], kinds: Sequence[Kind], *, context: int, new: int = 1) -> StepPlan:
        """A row for each slot (-1: base), with `new` tokens behind `context` others, in pages of its own."""
        pages = -(-(context + new) // self.page_size)
        if pages * len(slots) > self.num_pages:
            raise ValueError(f"{len(slots)} rows of {pages} pages do not fit into {self.num_pages}")
        random = np.random.default_rng(0)
        pool = self.parts.adapters.pool
        rows = []
        for i, slot in enumerate(slots):
            width = kinds[slot][0] * kinds[slot][1] if slot >= 0 else 0
            use = AdapterUse(slot, pool.generation(slot) if slot >= 0 else 0, width)
            tokens = tuple(random.integers(0, self.vocab_size, new).tolist())
            rows.append(RowPlan(str(i), tokens, context, tuple(range(i * pages, (i + 1) * pages)), use, True, i))
        return StepPlan(tuple(rows), len(rows) if new == 1 else 0)

    def step(self, plan: StepPlan) -> torch.Tensor:
        """Logits [rows, vocab]."""
        return self.runner.execute(self.batch.build(plan))

    @property
    def gpu_runner(self) -> GpuRunner:
        """The GPU's own program, which such models have."""
        assert isinstance(self.runner, GpuRunner)
        return self.runner

    def close(self) -> None:
        self.parts.adapters.close()


def _padded(numel: int) -> int:
    return -(-numel // ALIGNMENT) * ALIGNMENT
