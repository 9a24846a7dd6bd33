"""What every program is to the engine, something that computes a step; and what it is given to compute on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from gralora_kernels.dispatch import AdapterBackend
from gralora_kernels.stages import StartStage, untold
from gralora_kernels.tables import GroupTable
from gralora_runtime.model.base_layers import BaseLayers
from gralora_runtime.model.kv_pool import KVPool
from gralora_runtime.model.loading import BaseModel
from gralora_runtime.model.programs.apart import Apart
from gralora_runtime.stepping.batch import StepTensors


class Runner(Protocol):
    """Computes one step."""

    def execute(self, tensors: StepTensors, newest: Tensor | None = None) -> Tensor:
        """Logits of the tokens in `logits_index`, fp32 [sampling rows, vocab]; where an adapter of the step has more
        tokens than the base model as many columns more, which are minus infinity for all who have not.

        `newest` int32 [rows of the step before], on the device: what that step chose, for the tokens that follow. None:
        all tokens are in `input_ids`.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What a program computes on: the model, which it takes over, and the memory that others own too."""

    base: BaseModel
    kv_pool: KVPool
    arena: Tensor
    groups: Mapping[tuple[str, ...], GroupTable]  # of linear layers, but for the output head's
    parameters: Mapping[str, GroupTable]  # of experts and routers
    head_name: str
    embedding_name: str
    apart: Apart
    layers: BaseLayers  # is told where weights are
    backend: AdapterBackend
    page_size: int
    max_num_tokens: int
    max_num_rows: int
    max_model_len: int
    rungs: tuple[int, ...]  # numbers of rows that a GPU captures decode steps for
    batch_invariant: bool
    stage: StartStage = untold  # is told what takes long
    least_bits: int  # on the CPU: that base weights may be kept in, where those hold them exactly
