"""The whole program on this device: against transformers, graphs against launches, and adapters that change places."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu_check import Check
from benchmarks.gpu_check.engines import CheckedEngine, Kind, base_of, random_model
from gralora_runtime.adapters.residency.lease import AdapterLease
from gralora_runtime.config import in_directory
from gralora_runtime.model.selfcheck import check_runner, expected_logits
from gralora_runtime.plan import AdapterUse, RowPlan, StepPlan
from gralora_server.loadtest.synthetic import AdapterKind, make_adapters

KINDS: list[Kind] = [(8, 2), (4, 1), (16, 4), (2, 2)]
SIZES = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "kv_cache_bytes": 4 << 20, "adapter_pool_bytes": 8 << 20}
# Of the largest logit: products of other numbers of rows sum in another order.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
PROMPT = (5, 6, 7)
ON_GPU = torch.cuda.is_available()
HALF = torch.bfloat16 if ON_GPU else torch.float32  # the interpreter rounds bf16 in its own way
MAX_ROWS = 8 if ON_GPU else 3
RUNGS = (2, 4, 8) if ON_GPU else (2, 3)
STEPS = 40 if ON_GPU else 1
# Of the soak. A batch has half of the slots, so that the other half's adapters are loaded beside its steps.
SOAK_S = 15.0 if ON_GPU else 0.0
ADAPTERS, SLOTS, TOKENS = (32, 8, 6) if ON_GPU else (4, 2, 2)


def checks() -> Iterator[Check]:
    """All of them, by name."""
    for dtype in (torch.float32, torch.bfloat16) if ON_GPU else (torch.float32,):
        kind = str(dtype).removeprefix("torch.")
        yield f"logits are transformers', {kind}", partial(_selfcheck, dtype)
        yield f"graphs against launches, {kind}", partial(_graphs, dtype)
    yield "graphs against launches, batch-invariant", partial(_graphs, HALF, batch_invariant=True)
    yield "batch-invariant logits", _invariant
    yield "no answer of another's adapter", _soak


def _selfcheck(dtype: torch.dtype) -> str:
    engine = CheckedEngine("tiny", dtype, cuda_graphs=(1,), **SIZES)
    try:
        # The runner has taken the first model over: another of the same seed says what is right.
        expected = expected_logits(base_of(random_model("tiny", dtype)))
        check_runner(engine.parts.base, engine.runner, engine.batch, engine.page_size, expected)
    finally:
        engine.close()
    return "prompt chunks and a decode step"


def _graphs(dtype: torch.dtype, *, batch_invariant: bool = False) -> str:
    """Rows come and go; a step's logits by graphs are those of launches, and the same graph repeats its bits."""
    settings: dict[str, Any] = SIZES | {"batch_invariant": batch_invariant}
    graphs, launches = engines = [CheckedEngine("tiny", dtype, cuda_graphs=rungs, **settings) for rungs in (RUNGS, ())]
    for engine in engines:
        torch.manual_seed(1)  # the same adapters, and the same past
        engine.fill(KINDS)
        engine.fill_past()
    random, worst, same, rows = np.random.default_rng(0), 0.0, 0, 0
    for _ in range(STEPS):
        slots = random.integers(-1, len(KINDS), random.integers(1, MAX_ROWS + 1)).tolist()
        plan = graphs.plan(slots, KINDS, context=int(random.integers(0, 40)))
        first, again, launched = graphs.step(plan), graphs.step(plan), launches.step(plan)
        assert torch.equal(first, again), "the same graph, the same step, other bits"
        if batch_invariant and ON_GPU:  # numpy's rows depend on their matrix
            assert torch.equal(first, launched), f"{len(slots)} rows have other bits by a graph"
        error = float((first - launched).abs().max() / launched.abs().max())
        assert error <= TOLERANCE[dtype], f"logits differ by {error:.2g} of the largest"
        worst, rows = max(worst, error), rows + len(slots)
        same += int((first.argmax(-1) == launched.argmax(-1)).sum())
    for engine in engines:
        engine.close()
    # In 16 bits two logits may be equal, and which of them is greater is then a matter of the order of a sum.
    assert same == rows or (dtype != torch.float32 and not batch_invariant), f"{rows - same} greedy tokens differ"
    return f"{STEPS} steps, logits within {worst:.1e} of the largest, {same} of {rows} greedy tokens equal"


def _invariant() -> str:
    """A row's bits are those that it has alone."""
    engine = CheckedEngine("tiny", HALF, cuda_graphs=(1, MAX_ROWS), batch_invariant=True, **SIZES)
    engine.fill(KINDS)
    random = np.random.default_rng(0)
    for _ in range(STEPS):
        slots = random.integers(-1, len(KINDS), random.integers(2, MAX_ROWS + 1)).tolist()
        plan = engine.plan(slots, KINDS, context=int(random.integers(0, 40)))
        row = int(random.integers(len(slots)))
        together, alone = engine.step(plan), engine.step(StepPlan((plan.rows[row],), 1))
        _assert_same(together[row], alone[0], f"row {row} of {len(slots)} is another alone")
    engine.close()
    return f"{STEPS} steps of up to {MAX_ROWS} rows"


def _soak() -> str:
    """More adapters than slots, loaded and put out again by the manager while others answer: each as it did elsewhere,
    where it was alone and nothing ever moved."""
    with tempfile.TemporaryDirectory() as folder:
        random_model("tiny", HALF).save_pretrained(Path(folder, "model"))
        kinds = [AdapterKind(8, 2), AdapterKind(16, 4), AdapterKind(4, 1), AdapterKind(32, 1)]
        names = make_adapters(Path(folder, "model"), Path(folder, "adapters"), kinds, ADAPTERS)
        settings = SIZES | {"adapters": in_directory(Path(folder, "adapters")), "batch_invariant": True}
        expected = _expected(names, settings)
        # Half of the adapters fit into host memory: the others come from their files again.
        settings |= {"max_adapter_slots": SLOTS, "host_cache_bytes": ADAPTERS * (32 << 10)}
        engine = CheckedEngine("tiny", HALF, cuda_graphs=(SLOTS // 2,), **settings)
        try:
            answers = _churn(engine, names, expected)
            stats = engine.parts.adapters.stats()
            engine.parts.adapters.check_integrity()
        finally:
            engine.close()
    assert stats.evictions > 0, "nothing was ever put out: this check could not fail"
    return f"{answers} answers of {ADAPTERS} adapters in {SLOTS} slots, {stats.evictions} times one was put out"


def _expected(names: Sequence[str], settings: dict[str, Any]) -> dict[str, Tensor]:
    """Each adapter's answer alone, without graphs, with room for all."""
    engine, found = CheckedEngine("tiny", HALF, cuda_graphs=(), **settings), {}
    for name in names:
        lease = engine.parts.adapters.acquire(name).result(30)
        found[name] = _answers(engine, [lease])[0]
        engine.parts.adapters.release(lease)
    engine.close()
    kinds = {tuple(logits.flatten().tolist()) for logits in found.values()}
    assert len(kinds) == len(names), "adapters answer alike: this check could not fail"
    return found


def _churn(engine: CheckedEngine, names: Sequence[str], expected: dict[str, Tensor]) -> int:
    manager, random, answers = engine.parts.adapters, np.random.default_rng(0), 0

    def some() -> list[str]:
        return [names[i] for i in random.permutation(len(names))[: random.integers(1, SLOTS // 2 + 1)].tolist()]

    end_s, wanted = time.monotonic() + SOAK_S, some()
    acquired = [manager.acquire(name) for name in wanted]
    while answers < len(names) or time.monotonic() < end_s:
        leases = [future.result(30) for future in acquired]
        following = some()
        acquired = [manager.acquire(name) for name in following]  # loaded beside the steps of this batch
        for name, answer in zip(wanted, _answers(engine, leases), strict=True):
            tokens = answer.argmax(-1).tolist(), expected[name].argmax(-1).tolist()
            assert tokens[0] == tokens[1], f"{name} answered {tokens[0]}, not {tokens[1]}"
            _assert_same(answer, expected[name], f"{name} has other logits than alone")
        answers += len(leases)
        for lease in leases:
            manager.release(lease)
        wanted = following
    for future in acquired:
        manager.release(future.result(30))
    return answers


def _answers(engine: CheckedEngine, leases: Sequence[AdapterLease]) -> list[Tensor]:
    """Logits [TOKENS, vocab] of each row's greedy tokens: the prompt's step by step of its own, then decode steps."""
    texts, logits = [list(PROMPT) for _ in leases], []
    for begin in (0, *range(len(PROMPT), len(PROMPT) + TOKENS - 1)):
        rows = [
            RowPlan(
                str(i), tuple(text[begin:]), begin, (i,), AdapterUse(lease.slot, lease.generation, lease.width),
                samples=True, seat=i,
            )
            for i, (text, lease) in enumerate(zip(texts, leases, strict=True))
        ]  # fmt: skip
        logits.append(engine.step(StepPlan(tuple(rows), len(rows) if begin else 0)))
        for text, token in zip(texts, logits[-1].argmax(-1).tolist(), strict=True):
            text.append(token)
    return list(torch.stack(logits, 1))


def _assert_same(expected: Tensor, actual: Tensor, problem: str) -> None:
    """Bit for bit, except for the rows of numpy's products, which depend on their matrix."""
    if ON_GPU:
        assert torch.equal(expected, actual), problem
    else:
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3, msg=problem)
