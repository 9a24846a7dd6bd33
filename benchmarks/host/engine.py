"""The engine over the pretended device: in this process, step after step, with all that it does for its rows."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.host.device import EOS, MAX_WIDTH, VOCAB, Device, PretendExecutor, Programs, next_token
from benchmarks.sequences import make_sequence
from gralora_runtime.adapters.residency.lease import BASE_LEASE, AdapterLease
from gralora_runtime.observation.steps import Phase, StepObservation
from gralora_runtime.scheduling.pages import PagePool
from gralora_runtime.scheduling.scheduler import Scheduler
from gralora_runtime.scheduling.sequence import Sequence as EngineSequence
from gralora_runtime.stepping.batch import BatchBuilder
from gralora_runtime.stepping.engine import Engine
from gralora_runtime.stepping.fence import StepFence

PROMPT, TOKENS, PAGE_SIZE = 192, 128, 16  # so contexts are about 256
MAX_MODEL_LEN = 2048


def make_engine(rows: int, step_s: float, *, pipelined: bool) -> tuple[Engine, Device]:
    """For so many rows at once, and as many adapters."""
    max_tokens = max(4096, rows)
    observation, device = StepObservation(), Device(step_s)
    programs = Programs(
        max_rows=rows, max_tokens=max_tokens, max_model_len=MAX_MODEL_LEN, page_size=PAGE_SIZE, num_slots=rows
    )
    scheduler = Scheduler(
        PagePool(rows * MAX_MODEL_LEN // PAGE_SIZE, PAGE_SIZE, enable_prefix_cache=True),
        max_num_seqs=rows,
        max_num_batched_tokens=max_tokens,
        release_lease=lambda _: None,
        now_s=time.monotonic,
    )
    batch = BatchBuilder(max_num_tokens=max_tokens, page_size=PAGE_SIZE, slot_generation=lambda _: 1)
    executor = PretendExecutor(device, programs, observation, num_prompt=PROMPT)
    return Engine(scheduler, batch, executor, observation, StepFence(), pipelined=pipelined), device


@dataclass(frozen=True, kw_only=True)
class HostCost:
    """Milliseconds a step, and shares."""

    rows: int
    adapters: str
    plan_ms: float
    build_ms: float
    launch_ms: float
    sample_ms: float
    commit_ms: float
    step_over_T: float  # noqa: N815
    idle_share: float
    tokens_per_s: float


def measure(rows: int, adapters: str, step_s: float, *, pipelined: bool, steps: int = TOKENS) -> HostCost:
    """Steps in which all rows decode. Raises `AssertionError` when a token is not the right one."""
    engine, device = make_engine(rows, step_s, pipelined=pipelined)
    sequences = [_sequence(number, slot, steps) for number, slot in enumerate(slots_of(adapters, rows))]
    for sequence in sequences:
        engine.scheduler.add(sequence)
    while any(not sequence.num_output for sequence in sequences):
        engine.step()
    before, idle_s, count = engine.observation.read().phases, device.idle_s, 0
    first_s = device.ends_s[-1]
    while not any(sequence.num_output >= steps for sequence in sequences):
        engine.step()
        count += 1
    after = engine.observation.read().phases
    taken_s = device.ends_s[-1] - first_s
    for sequence in sequences:
        check(sequence.tokens, sequence.num_prompt, sequence.lease.slot)
    assert min(sequence.num_output for sequence in sequences) >= count, "a row was left out"
    engine.close()

    def mean_ms(phase: Phase) -> float:
        return round(1e3 * (after[phase].sum - before[phase].sum) / count, 3)

    return HostCost(
        rows=rows,
        adapters=adapters,
        plan_ms=mean_ms(Phase.SCHEDULE),
        build_ms=mean_ms(Phase.BUILD),
        launch_ms=mean_ms(Phase.FORWARD),
        sample_ms=mean_ms(Phase.SAMPLE),
        commit_ms=mean_ms(Phase.COMMIT),
        step_over_T=round(taken_s / count / step_s, 3),
        idle_share=round((device.idle_s - idle_s) / taken_s, 3),
        tokens_per_s=round(rows * count / taken_s),
    )


def slots_of(adapters: str, rows: int) -> list[int]:
    """`distinct`: one each; `zipf`: the r-th most wanted is taken by 1/r; `base`: none."""
    if adapters == "distinct":
        return list(range(rows))
    if adapters == "base":
        return [-1] * rows
    weights = 1 / np.arange(1, rows + 1)
    found: list[int] = np.random.default_rng(0).choice(rows, rows, p=weights / weights.sum()).tolist()
    return found


def check(tokens: Sequence[int], num_prompt: int, slot: int) -> None:
    """Every token behind the prompt is what the device says behind the one before."""
    for position in range(num_prompt - 1, len(tokens) - 1):
        expected = next_token(tokens[position], position, slot)
        assert tokens[position + 1] == expected, f"token {position + 1} is {tokens[position + 1]}, not {expected}"


def lease_of(slot: int) -> AdapterLease:
    """Of an adapter that is nothing but its slot; -1 is the base model."""
    if slot < 0:
        return BASE_LEASE
    return AdapterLease(str(slot), str(slot), slot, generation=1, width=MAX_WIDTH // 4, serial=0)


def prompt_of(number: int) -> list[int]:
    return np.random.default_rng(number).integers(0, VOCAB, PROMPT).tolist()  # type: ignore[no-any-return]


def _sequence(number: int, slot: int, steps: int) -> EngineSequence:
    return make_sequence(
        f"r{number}",
        prompt_of(number),
        lease_of(slot),
        max_tokens=steps + 64,
        vocab_size=VOCAB,
        eos_token_ids=EOS,
    )
