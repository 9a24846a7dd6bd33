"""How fast steps, prompts, attention and loads are, each beside the floor that this machine's own rates set."""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import loads
from benchmarks.gpu_check.clock import device, host_ms, in_a_graph_ms, kernel_us, median_ms, step_times, wait
from benchmarks.gpu_check.engines import CheckedEngine, Kind, random_model
from gralora_kernels.grouping import Grouping
from gralora_kernels.listing import ListPlanner
from gralora_kernels.triton_ops.adapters.launch import BLOCKING
from gralora_kernels.triton_ops.attention_launch import AttentionShape, PagedAttention
from gralora_runtime.plan import StepPlan

Case = dict[str, Any]
Rates = dict[str, Any]

ON_GPU = torch.cuda.is_available()
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
SHAPES = ("llama-3-8b", "smollm2-135m") if ON_GPU else ("tiny",)
CONTEXT = 256 if ON_GPU else 8  # tokens before a decode step's
ROWS = (1, 16, 64, 128) if ON_GPU else (1, 4)
PROMPTS = (512, 2048) if ON_GPU else (8,)
MIXED: list[Kind] = [(16, 4), (8, 2), (32, 1), (16, 1)]
# By what `adapters` of a case says: what is in the slots, which rows take in turns.
ADAPTERS: list[tuple[str, list[Kind]]] = [
    ("distinct", [(16, 4)] * 128),
    ("one", [(16, 4)]),
    ("distinct", [(16, 1)] * 128),
    ("distinct", [(64, 1)] * 128),
    ("mixed", MIXED * 32),
]
GIB = 1 << 30
KV_BYTES = 6 * GIB  # of the 8B shape: 128 rows of `CONTEXT`, and the longest prompt
# Of a GPU's memory beside pools: weights, and what steps and graphs take.
OTHER_BYTES = {"llama-3-8b": 22 * GIB, "smollm2-135m": 4 * GIB}
MOST_POOL_BYTES = {"llama-3-8b": 24 * GIB, "smollm2-135m": 6 * GIB}


def steps(rates: Rates) -> Iterator[Case]:
    """Decode steps and prompts of each shape."""
    for shape in SHAPES:
        missing = OTHER_BYTES.get(shape, 0) + KV_BYTES + GIB - _free_bytes()
        if missing > 0:
            yield {"what": "skipped", "shape": shape, "reason": f"{missing / GIB:.1f} GiB more of memory are needed"}
            continue
        started_s = time.perf_counter()
        engine = CheckedEngine(shape, DTYPE, **engine_sizes(shape))
        wait()
        ready_s = time.perf_counter() - started_s
        ladder = engine.gpu_runner.ladder
        assert ladder is not None
        yield {
            "what": "graphs", "shape": shape, "graphs": len(ladder), "capture_s": round(ladder.seconds, 2),
            "start_to_ready_s": round(ready_s, 2),
        }  # fmt: skip
        yield from _decode_steps(engine, shape, rates)
        engine.fill([(16, 4)])
        for tokens in PROMPTS:
            for slot in (-1, 0):
                yield from _prompt(engine, shape, tokens, slot, rates)
        engine.close()
        del engine
        _give_back()


def transformers_steps(_: Rates) -> Iterator[Case]:
    """What users compare with: `generate`, by the difference of two lengths."""
    for shape in SHAPES:
        if OTHER_BYTES.get(shape, 0) > _free_bytes():
            continue
        model = random_model(shape, DTYPE)
        for rows in (1, 16) if ON_GPU else (1,):
            ids = torch.randint(0, model.config.vocab_size, (rows, CONTEXT)).to(device())
            short_ms, long_ms = (median_ms(partial(_generate, model, ids, count), 3, warm=1) for count in (2, 10))
            yield {"what": "transformers", "shape": shape, "rows": rows, "step_ms": round((long_ms - short_ms) / 8, 3)}
        del model
        _give_back()


def _generate(model: Any, ids: Tensor, count: int) -> None:
    with torch.inference_mode():
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count, do_sample=False,
            pad_token_id=0,
        )  # fmt: skip


def attention(rates: Rates) -> Iterator[Case]:
    """One row and a long context: the share of the bandwidth that is used, and torch's own attention beside it."""
    shape = AttentionShape(heads=32, kv_heads=8, head_dim=128, page_size=16, q_row=48)
    for context in (8192, 32768) if ON_GPU else (300,):
        pages = -(-context // 16)
        keys, values = (torch.randn(pages, 16, 8, 128, device=device()).to(DTYPE) for _ in range(2))
        q = torch.randn(1, 48 * 128, device=device()).to(DTYPE)
        milliseconds, floor_ms = _ours_ms(shape, context, q, keys, values), 2 * keys.nbytes / rates["read_gb_s"] / 1e6
        torch_ms = _torchs_ms(context, q[:, : 32 * 128].view(1, 32, 128), keys, values) if ON_GPU else None
        yield {
            "what": "attention", "context": context, "ms": round(milliseconds, 4), "floor_ms": round(floor_ms, 4),
            "share_of_bandwidth": round(floor_ms / milliseconds, 3),
            "torch_ms": None if torch_ms is None else round(torch_ms, 4),
        }  # fmt: skip


def _ours_ms(shape: AttentionShape, context: int, q: Tensor, keys: Tensor, values: Tensor) -> float:
    table = torch.randperm(len(keys)).view(1, -1).int().to(device())
    out = torch.empty(1, shape.heads * shape.head_dim, dtype=DTYPE, device=device())
    ours = PagedAttention(shape, DTYPE, device(), invariant=False)
    starts, lengths = np.array([0, 1], np.int32), np.array([context], np.int32)
    ours.prepare(starts, lengths)
    attend = partial(
        ours.attend, out, q, keys, values, page_table=table, query_starts=torch.from_numpy(starts).to(device()),
        context_lens=torch.from_numpy(lengths).to(device()), scale=shape.head_dim**-0.5, window=0,
    )  # fmt: skip
    return in_a_graph_ms(attend)


def _torchs_ms(context: int, q: Tensor, keys: Tensor, values: Tensor) -> float | None:
    """`varlen_attn` on keys in one piece, the most that it could have; None where it cannot do that."""
    try:
        from torch.nn.attention.varlen import varlen_attn  # torch 2.10 and later

        q_starts, k_starts = (torch.tensor([0, end], dtype=torch.int32, device=device()) for end in (1, context))
        attend = partial(
            varlen_attn, q, keys.flatten(0, 1), values.flatten(0, 1), q_starts, k_starts, max_q=1, max_k=context,
            enable_gqa=True,
        )  # fmt: skip
        with torch.inference_mode():
            attend()
            return in_a_graph_ms(attend)
    except (ImportError, TypeError, RuntimeError):
        traceback.print_exc()
        return None


def loading(_: Rates) -> Iterator[Case]:
    """One adapter from the page cache into the pool."""
    yield {"what": "loads"} | loads.measure("llama-3-8b" if ON_GPU else "tiny", device(), count=3 if ON_GPU else 2)


@dataclass(frozen=True, slots=True)
class Filled:
    """What is in an engine's slots, which rows take in turns; nothing: the base model alone."""

    name: str
    kinds: Sequence[Kind]
    sizes: Sequence[int]  # bytes of each


def _decode_steps(engine: CheckedEngine, shape: str, rates: Rates) -> Iterator[Case]:
    for rows in ROWS:
        yield from _step(engine, shape, rows, Filled("base", [], []), rates)
    for name, wanted in ADAPTERS:
        kinds = engine.fitting(wanted[: ROWS[-1]])
        filled = Filled(name, kinds, engine.fill(kinds))
        for rows in ROWS:
            # Of one row they are all the same; and of more than the pool holds there is no such step.
            if (rows == 1 and name != "distinct") or not kinds or (name != "one" and rows > len(kinds)):
                continue
            yield from _step(engine, shape, rows, filled, rates)


def _step(engine: CheckedEngine, shape: str, rows: int, filled: Filled, rates: Rates) -> Iterator[Case]:
    kinds = filled.kinds
    slots = [i % len(kinds) if kinds else -1 for i in range(rows)]
    r, k = kinds[0] if len(set(kinds)) == 1 else (None, None)
    plan = engine.plan(slots, kinds, context=CONTEXT)
    tensors = engine.batch.build(plan)
    floor_ms = _floor_ms(engine, plan, [filled.sizes[slot] for slot in slots if slot >= 0], rates)
    step = partial(engine.runner.execute, tensors)
    times = step_times(step)
    times["plan_ms"] = _list_ms(engine, tensors.grouping) if kinds else 0.0
    case = {"shape": shape, "rows": rows, "adapters": filled.name, "r": r, "k": k}
    yield {"what": "step"} | case | {
        "floor_ms": round(floor_ms, 5), "times_floor": round(times["step_ms"] / floor_ms, 2),
    } | {name: round(milliseconds, 3) for name, milliseconds in times.items()}  # fmt: skip
    if ON_GPU and filled.name in ("base", "distinct"):
        yield {"what": "kernels"} | case | {"us": kernel_us(step)}


def _floor_ms(engine: CheckedEngine, plan: StepPlan, adapter_bytes: Sequence[int], rates: Rates) -> float:
    """What a step must read once, or must multiply. `adapter_bytes`: of each row that has one."""
    distinct = {row.adapter.slot for row in plan.rows if row.adapter.slot >= 0}
    read = engine.weight_bytes + sum(adapter_bytes[: len(distinct)])  # rows take slots in turns from the first on
    read += sum(row.context_len for row in plan.rows) * _kv_token_bytes(engine)
    flop = 2 * (len(plan.rows) * engine.weight_bytes + sum(adapter_bytes)) / DTYPE.itemsize
    return float(max(read / rates["read_gb_s"] / 1e6, flop / rates["product_tflop_s"] / 1e9))


def _list_ms(engine: CheckedEngine, grouping: Grouping) -> float:
    """The host's part of the work lists, of adapters that it has seen before."""
    planner = ListPlanner(list(engine.parts.adapters.pool.groups.values()), BLOCKING)
    planner.plan(grouping)
    return host_ms(partial(planner.plan, grouping), 9)


def _prompt(engine: CheckedEngine, shape: str, tokens: int, slot: int, rates: Rates) -> Iterator[Case]:
    plan = engine.plan([slot], [(16, 4)], context=0, new=tokens)
    tensors = engine.batch.build(plan)
    # Of the head's product only the last token's row is wanted.
    numel = tokens * (engine.weight_bytes - engine.head_bytes) / DTYPE.itemsize
    numel += 0 if slot < 0 else tokens * engine.adapter_numel((16, 4))
    step = partial(engine.runner.execute, tensors)
    milliseconds = median_ms(step, 5 if ON_GPU else 1, warm=1 if ON_GPU else 0)
    floor_ms = max(2 * numel / rates["product_tflop_s"] / 1e9, engine.weight_bytes / rates["read_gb_s"] / 1e6)
    case = {"shape": shape, "tokens": tokens, "adapters": "base" if slot < 0 else "one"}
    yield {"what": "prefill"} | case | {
        "ms": round(milliseconds, 3), "floor_ms": round(floor_ms, 5), "times_floor": round(milliseconds / floor_ms, 2),
    } | ({"host_ms": round(host_ms(step, 3), 3)} if ON_GPU else {})  # fmt: skip
    if ON_GPU:
        yield {"what": "kernels"} | case | {"us": kernel_us(step)}


def _kv_token_bytes(engine: CheckedEngine) -> int:
    config = engine.model.config
    numel: int = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return numel * DTYPE.itemsize


def _give_back() -> None:
    """An engine's parts know each other, so that their memory is free only when they have been collected."""
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()


def _free_bytes() -> int:
    return torch.cuda.mem_get_info()[0] if ON_GPU else 1 << 60


def engine_sizes(shape: str) -> dict[str, Any]:
    if shape == "tiny":
        return {
            "max_num_seqs": 4, "max_num_batched_tokens": 16, "kv_cache_bytes": 4 << 20, "adapter_pool_bytes": 8 << 20,
            "cuda_graphs": (1, 4),
        }  # fmt: skip
    pool_bytes = min(MOST_POOL_BYTES[shape], _free_bytes() - OTHER_BYTES[shape] - KV_BYTES)
    return {
        "max_num_seqs": 128, "max_num_batched_tokens": 2048, "max_model_len": 4096, "kv_cache_bytes": KV_BYTES,
        "adapter_pool_bytes": pool_bytes, "max_adapter_slots": 256, "cuda_graphs": ROWS,
    }  # fmt: skip


PARTS = {"steps": steps, "transformers": transformers_steps, "attention": attention, "loads": loading}
