"""A device that is not there. It computes steps one after the other, each in the same time, and its tokens are known.

All that the host does for a GPU's step is done: work lists of an 8B model's layers, attention's items, the inputs in
one block. Launches are left out.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton

from gralora_kernels.alignment import ALIGNMENT
from gralora_kernels.tables import Entry, TableSet
from gralora_kernels.triton_ops.adapters import launch
from gralora_kernels.triton_ops.adapters.launch import TritonBackend
from gralora_kernels.triton_ops.attention_launch import AttentionShape, PagedAttention
from gralora_runtime.model.programs.gpu.inputs import StepInputs
from gralora_runtime.observation.steps import Phase, StepObservation
from gralora_runtime.sampling.outcome import Sampled, SampledToken
from gralora_runtime.sampling.state import SamplerState
from gralora_runtime.stepping.batch import StepTensors

CPU = torch.device("cpu")
VOCAB = 49152  # of the tokenizer that makes the text
LAYERS, HIDDEN, INTERMEDIATE, KV = 32, 4096, 14336, 1024  # Llama-3-8B's
KINDS = ((16, 4), (16, 1), (8, 2), (32, 4), (64, 1))  # r, k of customers' adapters
MAX_WIDTH = 512
EOS = frozenset({2})


def next_token(token: Any, position: Any, slot: Any) -> Any:
    """What the model says behind a token: numbers, or arrays of them."""
    return (token * 31 + position * 7 + slot * 13 + 11) % VOCAB


class Programs:
    """The host's part of a GPU's program, for steps of at most so many rows and tokens."""

    def __init__(self, *, max_rows: int, max_tokens: int, max_model_len: int, page_size: int, num_slots: int) -> None:
        shapes = [
            (HIDDEN, [HIDDEN, KV, KV]),
            (HIDDEN, [HIDDEN]),
            (HIDDEN, [INTERMEDIATE] * 2),
            (INTERMEDIATE, [HIDDEN]),
        ]
        self._tables = TableSet(shapes * LAYERS, num_slots, CPU)
        for slot in range(num_slots):
            self._tables.write(slot, self._entries(*KINDS[slot % len(KINDS)]))
        max_pages = -(-max_model_len // page_size)
        self._inputs = StepInputs(max_tokens=max_tokens, max_rows=max_rows, max_pages=max_pages, device=CPU)
        shape = AttentionShape(heads=32, kv_heads=8, head_dim=128, page_size=page_size, q_row=48)
        self._attention = PagedAttention(shape, torch.bfloat16, CPU, invariant=False)
        self._frozen_attention = self._attention.frozen(max_rows, max_model_len)
        with _nothing_is_launched():
            self._adapters = TritonBackend(CPU)
            self._frozen = {
                tile: self._adapters.frozen(
                    self._tables.groups,
                    max_tokens=max_rows,
                    max_width=MAX_WIDTH,
                    dtype=torch.bfloat16,
                    tile_tokens=tile,
                )
                for tile in (1, 16)
            }

    def prepare(self, tensors: StepTensors) -> None:
        """As `GpuRunner` does before it launches or replays."""
        grouping = tensors.grouping
        is_decode = tensors.max_query_len == 1
        attention = self._frozen_attention if is_decode else self._attention
        if grouping.num_adapted:
            with _nothing_is_launched():
                adapters = self._frozen[self._frozen[1].tile_tokens(grouping)] if is_decode else self._adapters
                adapters.prepare(self._tables.groups, grouping)
        attention.prepare(tensors.query_starts.numpy(), tensors.context_lens.numpy())
        if is_decode:
            self._inputs.load_padded(tensors, len(tensors.context_lens))
        else:
            self._inputs.load(tensors)

    def _entries(self, r: int, k: int) -> dict[int, list[Entry]]:
        entries, size = {}, 0
        for position, table in enumerate(self._tables.modules):
            a_offset, b_offset = size, size + r * table.in_features
            size = -(-(b_offset + r * table.out_features) // ALIGNMENT) * ALIGNMENT
            entries[position] = [Entry(a_offset=a_offset, b_offset=b_offset, r=r, k=k, scale=0.5)]
        return entries


class Device:
    """When it is busy. Steps begin when the one before has ended and the host has launched them."""

    def __init__(self, step_s: float) -> None:
        self.step_s = step_s
        self.idle_s = 0.0
        self.ends_s: list[float] = []  # of each step
        self.first_steps: dict[int, int] = {}  # by adapter slot: the step that made its newest request's first token
        self._free_s = time.perf_counter()

    def launch(self) -> float:
        """When the step ends that is launched now."""
        now_s = time.perf_counter()
        self.idle_s += max(0.0, now_s - self._free_s)
        self._free_s = max(now_s, self._free_s) + self.step_s
        self.ends_s.append(self._free_s)
        return self._free_s


class PretendExecutor:
    """Launches at once; whoever waits sleeps until the step has ended. Tokens are those of `next_token`."""

    def __init__(self, device: Device, programs: Programs, observation: StepObservation, *, num_prompt: int) -> None:
        """`num_prompt`: tokens of every prompt."""
        self._device, self._programs, self._observation = device, programs, observation
        self._last_of_prompt = num_prompt - 1
        self._newest = np.zeros(0, np.int64)

    def launch(self, tensors: StepTensors, states: Sequence[SamplerState], seats: Sequence[int]) -> Waiting:  # noqa: ARG002
        self._observation.timed(Phase.FORWARD, self._programs.prepare, tensors)
        ends_s = self._device.launch()
        self._newest = self._tokens(tensors)
        for state in states:
            state.observe(0)
        return Waiting(ends_s, self._newest, self._observation)

    def close(self) -> None:
        """Nothing runs beside the caller."""

    def _tokens(self, tensors: StepTensors) -> Any:
        """The device's own work, which a GPU does without the host."""
        ids, follows = tensors.input_ids[0].numpy().copy(), tensors.follows.numpy()
        known = follows < 0
        ids[~known] = self._newest[follows[~known]]
        slots = np.full(len(ids), -1)
        grouping = tensors.grouping
        slots[grouping.order] = np.repeat(grouping.slots, np.diff(grouping.starts))
        index, positions = tensors.logits_index.numpy(), tensors.position_ids[0].numpy()
        for slot in slots[index][positions[index] == self._last_of_prompt].tolist():
            self._device.first_steps[slot] = len(self._device.ends_s) - 1
        return next_token(ids, positions, slots)[index]


class Waiting:
    """A step on its way."""

    def __init__(self, ends_s: float, tokens: Any, observation: StepObservation) -> None:
        self._ends_s, self._tokens, self._observation = ends_s, tokens, observation

    def wait(self) -> Sequence[Sampled]:
        left_s = self._ends_s - time.perf_counter()
        if left_s > 0:
            time.sleep(left_s)
        return self._observation.timed(Phase.SAMPLE, self._read)

    def _read(self) -> Sequence[Sampled]:
        return [SampledToken(token) for token in self._tokens.tolist()]


class _Nothing:
    """In a kernel's place."""

    def __getitem__(self, grid: object) -> Any:
        return lambda *_, **__: None


@contextmanager
def _nothing_is_launched() -> Iterator[None]:
    """Triton's backend works without a GPU only under the interpreter, whose launches would be the host's."""
    with mock.patch.object(launch, "list_kernel", _Nothing()), triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = True
        yield
