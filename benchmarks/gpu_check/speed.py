"""How fast steps, prompts, attention and loads are, each beside the floor that this machine's own rates set."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks import loads
from benchmarks.gpu_check.clock import device, device_ms, host_ms, median_ms, wait
from benchmarks.gpu_check.engines import CheckedEngine, Kind, random_model
from gralora_kernels.triton_ops.attention_launch import AttentionShape, PagedAttention

Case = dict[str, Any]
Rates = dict[str, Any]

CONTEXT = 256  # tokens before a decode step's
ROWS = (1, 16, 64, 128) if torch.cuda.is_available() else (1, 4)
MIXED: list[Kind] = [(16, 4), (8, 2), (32, 1), (16, 1)]


def steps(rates: Rates) -> Iterator[Case]:
    """Decode steps of each shape: base, adapters of their own, one for all."""
    for shape in ("smollm2-135m", "llama-3-8b") if torch.cuda.is_available() else ("tiny",):
        started_s = time.perf_counter()
        engine = CheckedEngine(shape, _dtype(), **_sizes(shape))
        wait()
        yield {"what": "start", "shape": shape, "seconds": round(time.perf_counter() - started_s, 2)}
        yield from _steps(engine, shape, "base", [], rates)
        for name, kinds in (
            ("distinct", [(16, 4)] * 128),
            ("distinct", [(16, 1)] * 128),
            ("distinct", [(64, 1)] * 64),
            ("mixed", MIXED * 32),
        ):
            yield from _steps(engine, shape, name, kinds[: ROWS[-1]], rates)
            if name == "distinct" and kinds[0] == (16, 4):
                yield from _steps(engine, shape, "one", kinds[: ROWS[-1]], rates)
        engine.fill([(16, 4)])
        for tokens in (512, 2048) if torch.cuda.is_available() else (8,):
            for slot in (-1, 0):
                yield _prompt(engine, shape, tokens, slot, rates)
        engine.close()
        del engine
        torch.cuda.empty_cache()


def transformers_steps() -> Iterator[Case]:
    """What users compare with: `generate`, by the difference of two lengths."""
    for shape in ("smollm2-135m", "llama-3-8b") if torch.cuda.is_available() else ("tiny",):
        model = random_model(shape, _dtype())
        for rows in (1, 16) if torch.cuda.is_available() else (1,):
            tokens = CONTEXT if torch.cuda.is_available() else 8
            ids = torch.randint(0, model.config.vocab_size, (rows, tokens)).to(device())
            short_ms, long_ms = (median_ms(partial(_generate, model, ids, count), 3, warm=1) for count in (4, 20))
            yield {"what": "transformers", "shape": shape, "rows": rows, "step_ms": round((long_ms - short_ms) / 16, 3)}
        del model
        torch.cuda.empty_cache()


def _generate(model: Any, ids: torch.Tensor, count: int) -> None:
    with torch.inference_mode():
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count, do_sample=False,
            pad_token_id=0,
        )  # fmt: skip


def attention(rates: Rates) -> Iterator[Case]:
    """One row and a long context: the share of the bandwidth that is used."""
    shape = AttentionShape(heads=32, kv_heads=8, head_dim=128, page_size=16, q_row=48)
    for context in (8192, 32768) if torch.cuda.is_available() else (300,):
        pages = -(-context // 16)
        keys, values = (torch.randn(pages, 16, 8, 128, device=device()).to(_dtype()) for _ in range(2))
        table = torch.randperm(pages).view(1, -1).int().to(device())
        q = torch.randn(1, 48 * 128, device=device()).to(_dtype())
        out = torch.empty(1, 32 * 128, dtype=_dtype(), device=device())
        ours = PagedAttention(shape, _dtype(), device(), invariant=False)
        starts, lengths = np.array([0, 1], np.int32), np.array([context], np.int32)
        ours.prepare(starts, lengths)
        attend = partial(
            ours.attend, out, q, keys, values, page_table=table, query_starts=torch.from_numpy(starts).to(device()),
            context_lens=torch.from_numpy(lengths).to(device()), scale=128**-0.5, window=0,
        )  # fmt: skip
        milliseconds, floor_ms = device_ms(attend, 20), 2 * keys.nbytes / rates["read_gb_s"] / 1e6
        yield {
            "what": "attention", "context": context, "ms": round(milliseconds, 4), "floor_ms": round(floor_ms, 4),
            "share_of_bandwidth": round(floor_ms / milliseconds, 3),
        }  # fmt: skip


def loading() -> Iterator[Case]:
    """One adapter from the page cache into the pool."""
    shape = "llama-3-8b" if torch.cuda.is_available() else "tiny"
    yield {"what": "loads"} | loads.measure(shape, device(), count=5 if torch.cuda.is_available() else 2)


def _steps(
    engine: CheckedEngine, shape: str, adapters: str, kinds: Sequence[Kind], rates: Rates
) -> Iterator[Case]:  # fmt: skip
    sizes = engine.fill(kinds) if kinds else []
    for count in ROWS:
        if kinds and count > len(kinds):
            continue  # the pool holds no more of them
        slots = [-1 if adapters == "base" else 0 if adapters == "one" else i for i in range(count)]
        plan = engine.plan(slots, kinds, context=CONTEXT if shape != "tiny" else 8)
        tensors = engine.batch.build(plan)
        read = engine.weight_bytes + sum(sizes[slot] for slot in set(slots) if slot >= 0)
        read += sum(row.context_len for row in plan.rows) * _kv_token_bytes(engine)
        floor_ms = read / rates["read_gb_s"] / 1e6
        rounds = 20 if torch.cuda.is_available() else 1
        execute = partial(engine.runner.execute, tensors)
        step_ms, host = median_ms(execute, rounds, warm=rounds // 4), host_ms(execute, rounds)
        yield {
            "what": "step", "shape": shape, "rows": count, "adapters": adapters, "r": kinds[0][0] if kinds else None,
            "k": kinds[0][1] if kinds else None, "step_ms": round(step_ms, 3), "floor_ms": round(floor_ms, 3),
            "times_floor": round(step_ms / floor_ms, 2), "host_ms": round(host, 3),
        }  # fmt: skip


def _prompt(engine: CheckedEngine, shape: str, tokens: int, slot: int, rates: Rates) -> Case:
    plan = engine.plan([slot], [(16, 4)], context=0, new=tokens)
    tensors = engine.batch.build(plan)
    flops = 2 * tokens * engine.weight_bytes / _dtype().itemsize
    milliseconds = median_ms(lambda: engine.runner.execute(tensors), 5 if torch.cuda.is_available() else 1, warm=1)
    floor_ms = flops / rates["product_tflop_s"] / 1e9
    return {
        "what": "prefill", "shape": shape, "tokens": tokens, "adapters": "base" if slot < 0 else "one",
        "ms": round(milliseconds, 3), "floor_ms": round(floor_ms, 3), "times_floor": round(milliseconds / floor_ms, 2),
    }  # fmt: skip


def _kv_token_bytes(engine: CheckedEngine) -> int:
    config = engine.model.config
    numel: int = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return numel * _dtype().itemsize


def _dtype() -> torch.dtype:
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


def _sizes(shape: str) -> dict[str, Any]:
    if shape == "tiny":
        return {
            "max_num_seqs": 4, "max_num_batched_tokens": 16, "kv_cache_bytes": 4 << 20, "adapter_pool_bytes": 8 << 20,
            "cuda_graphs": (1, 4),
        }  # fmt: skip
    pool = (24 << 30) if shape == "llama-3-8b" else (4 << 30)
    return {
        "max_num_seqs": 128, "max_num_batched_tokens": 2048, "max_model_len": 4096, "kv_cache_bytes": 6 << 30,
        "adapter_pool_bytes": pool, "max_adapter_slots": 256, "cuda_graphs": (1, 16, 64, 128),
    }  # fmt: skip
