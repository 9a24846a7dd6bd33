"""The whole program on this device: against transformers, graphs against launches, and adapters that change places."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.gpu_check.engines import CheckedEngine, Kind, base_of, random_model
from gralora_kernels.tables import Entry
from gralora_runtime.model.selfcheck import check_runner, expected_logits
from gralora_runtime.plan import AdapterUse, RowPlan, StepPlan

KINDS: list[Kind] = [(8, 2), (4, 1), (16, 4), (2, 2)]
SIZES = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "kv_cache_bytes": 4 << 20, "adapter_pool_bytes": 8 << 20}
# Of the largest logit: products of other numbers of rows sum in another order.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
SOAK_S = 20.0

Check = tuple[str, Callable[[], str]]


def checks() -> Iterator[Check]:
    """All of them, by name."""
    on_gpu = torch.cuda.is_available()
    for dtype in (torch.float32, torch.bfloat16) if on_gpu else (torch.float32,):
        kind = str(dtype).removeprefix("torch.")
        yield f"logits are transformers', {kind}", partial(_selfcheck, dtype)
        yield f"graphs against launches, {kind}", partial(_graphs, dtype, 40 if on_gpu else 3)
    yield "batch-invariant logits", partial(_invariant, 40 if on_gpu else 2)
    yield "no answer of another's adapter", partial(_soak, SOAK_S if on_gpu else 0.0)


def _selfcheck(dtype: torch.dtype) -> str:
    engine = CheckedEngine("tiny", dtype, cuda_graphs=(1,), **SIZES)
    try:
        # The runner has taken the first model over: another of the same seed says what is right.
        expected = expected_logits(base_of(random_model("tiny", dtype)))
        check_runner(engine.parts.base, engine.runner, engine.batch, engine.page_size, expected)
    finally:
        engine.close()
    return "prompt chunks and a decode step"


def _graphs(dtype: torch.dtype, steps: int) -> str:
    """Rows come and go; a step's logits by graphs are those of launches, and the same graph repeats its bits."""
    engines = [CheckedEngine("tiny", dtype, cuda_graphs=rungs, **SIZES) for rungs in ((2, 4, 8), ())]
    for engine in engines:
        torch.manual_seed(1)
        engine.fill(KINDS)
    random, worst, same = np.random.default_rng(0), 0.0, 0
    for _ in range(steps):
        slots = random.integers(-1, len(KINDS), random.integers(1, 9)).tolist()
        plan = engines[0].plan(slots, KINDS, context=int(random.integers(0, 40)))
        first, again, launched = engines[0].step(plan), engines[0].step(plan), engines[1].step(plan)
        assert torch.equal(first, again), "the same graph, the same step, other bits"
        error = float((first - launched).abs().max() / launched.abs().max())
        assert error <= TOLERANCE[dtype], f"logits differ by {error:.2g} of the largest"
        worst, same = max(worst, error), same + int((first.argmax(-1) == launched.argmax(-1)).sum())
    for engine in engines:
        engine.close()
    return f"{steps} steps, logits within {worst:.1e} of the largest, {same} greedy tokens equal"


def _invariant(steps: int) -> str:
    """A row's bits are those that it has alone."""
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    engine = CheckedEngine("tiny", dtype, cuda_graphs=(1, 8), batch_invariant=True, **SIZES)
    engine.fill(KINDS)
    random = np.random.default_rng(0)
    for _ in range(steps):
        slots = random.integers(-1, len(KINDS), random.integers(2, 9)).tolist()
        plan = engine.plan(slots, KINDS, context=int(random.integers(0, 40)))
        together = engine.step(plan)
        row = int(random.integers(len(slots)))
        alone = engine.step(StepPlan((plan.rows[row],), 1))
        if torch.cuda.is_available():  # numpy's rows depend on their matrix
            assert torch.equal(together[row], alone[0]), f"row {row} of {len(slots)} has other bits alone"
    engine.close()
    return f"{steps} steps of up to 8 rows"


def _soak(seconds: float) -> str:
    """More adapters than slots, put into ranges and slots of others again and again; each answers as it did alone."""
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    engine = CheckedEngine("tiny", dtype, cuda_graphs=(4,), **SIZES)
    pool, tables = engine.parts.adapters.pool, engine.parts.adapters.pool.table_set
    engine.fill([(8, 2)] * 12)
    blobs = [pool.arena[tables.rows.host_index[0, slot, 0, 0] :] for slot in range(12)]
    size = int(tables.rows.host_index[0, 1, 0, 0])
    blobs = [blob[:size].clone() for blob in blobs]
    entries = {position: _entries(tables.rows.host_index[position, 0]) for position in range(len(tables.modules))}

    def put(slot: int, adapter: int) -> None:
        """As the pool does it: rows away, weights, rows."""
        with pool.transfer.moving(after_steps=True):
            tables.clear(slot)
            pool.transfer.write_rows(tables, slot)
            pool.transfer.upload(pool.arena[slot * size : (slot + 1) * size], blobs[adapter].cpu())
            tables.write(slot, entries, offset=slot * size)
            pool.transfer.write_rows(tables, slot)

    prompt = StepPlan((RowPlan("0", (5, 6, 7), 0, (0,), AdapterUse(0, pool.generation(0), 16), samples=True),), 0)
    expected = []
    for adapter in range(12):
        put(0, adapter)
        expected.append(engine.step(prompt))
    random, answers, end_s = np.random.default_rng(0), 0, time.monotonic() + seconds
    while not answers or time.monotonic() < end_s:
        slot, adapter = int(random.integers(4)), int(random.integers(12))
        put(slot, adapter)
        use = AdapterUse(slot, pool.generation(slot), 16)
        row = RowPlan("0", (5, 6, 7), 0, (0,), use, samples=True)
        answer = engine.step(StepPlan((row,), 0))
        assert torch.equal(answer, expected[adapter]), f"adapter {adapter} in slot {slot} gave another's answer"
        answers += 1
    different = {tuple(one.flatten().tolist()) for one in expected}
    assert len(different) == 12, "adapters answer alike: this check could not fail"
    engine.close()
    return f"{answers} answers of 12 adapters in 4 slots, bit for bit"


def _entries(rows: npt.NDArray[np.int64]) -> list[Entry]:
    return [
        Entry(a_offset=a, b_offset=b, r=r, k=k, scale=0.5) for a, b, r, k in rows.tolist() if r
    ]  # fmt: skip
