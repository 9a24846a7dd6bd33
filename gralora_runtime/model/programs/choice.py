"""Who computes a model: a program written for its build, or else transformers' own forward pass."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gralora_kernels.dispatch import AdapterBackend
from gralora_kernels.tables import GroupTable
from gralora_kernels.warmup import warm_up_backend
from gralora_runtime.errors import ConfigError
from gralora_runtime.model.description import OtherBuildError, describe
from gralora_runtime.model.kv_pool import KVPool
from gralora_runtime.model.loading import BaseModel
from gralora_runtime.model.programs.cpu import CpuRunner
from gralora_runtime.model.programs.runner import Runner
from gralora_runtime.model.programs.transformers.runner import TransformersRunner

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What a program computes on: the model, which it takes over, and the memory that others own too."""

    base: BaseModel
    kv_pool: KVPool
    arena: Tensor
    groups: Mapping[tuple[str, ...], GroupTable]
    backend: AdapterBackend
    page_size: int
    max_num_tokens: int
    max_num_rows: int
    max_model_len: int
    rungs: tuple[int, ...]  # numbers of rows that a GPU captures decode steps for
    batch_invariant: bool


def kv_in_panels(backend: AdapterBackend, device: torch.device) -> bool:
    """Whether keys and values lie as the CPU's kernels want them (see `KVPool`)."""
    return device.type == "cpu" and backend.name != "triton"


def reserved_bytes(base: BaseModel, backend: AdapterBackend, *, max_tokens: int, max_rows: int, num_rungs: int) -> int:
    """Of a GPU's memory, what pools must leave to the program."""
    if base.model.device.type == "cpu" or backend.name != "triton":
        return 0
    from gralora_runtime.model.programs.gpu.memory import workspace_bytes

    try:
        model = describe(base.model)
    except OtherBuildError:
        return 0
    return workspace_bytes(model, max_tokens=max_tokens, max_rows=max_rows, num_graphs=2 * num_rungs)


def make_runner(served: Served) -> Runner:
    """The fastest program that can compute this model, named in the log with the reason if it is the slow one.

    Raises `ConfigError` if batch-invariant results were asked for and there is only the slow one on a GPU.
    """
    try:
        return _written_program(served)
    except OtherBuildError as reason:
        if served.batch_invariant and served.base.model.device.type != "cpu":
            raise ConfigError(f"batch_invariant: this model has no program of its own here: {reason}") from reason
        logger.warning("computed by transformers' own forward pass, the slow way: %s", reason)
    warm_up_backend(served.backend, device=served.base.model.device, dtype=served.base.model.dtype)
    return TransformersRunner(
        served.base,
        served.kv_pool,
        arena=served.arena,
        groups=served.groups,
        backend=served.backend,
    )


def _written_program(served: Served) -> Runner:
    if served.backend.name not in ("cpu", "triton"):
        raise OtherBuildError(f"kernel backend {served.backend.name!r} has no program")
    model = describe(served.base.model)
    if served.backend.name == "cpu":
        return CpuRunner(
            served.base,
            model,
            served.kv_pool,
            arena=served.arena,
            groups=served.groups,
            page_size=served.page_size,
            max_num_tokens=served.max_num_tokens,
        )
    from gralora_kernels.triton_ops.adapters.launch import TritonBackend  # needs triton
    from gralora_runtime.model.programs.gpu.runner import GpuRunner

    assert isinstance(served.backend, TritonBackend)
    return GpuRunner(
        served.base,
        model,
        served.kv_pool,
        arena=served.arena,
        groups=served.groups,
        backend=served.backend,
        page_size=served.page_size,
        max_num_tokens=served.max_num_tokens,
        max_num_rows=served.max_num_rows,
        max_model_len=served.max_model_len,
        rungs=served.rungs,
        batch_invariant=served.batch_invariant,
    )
