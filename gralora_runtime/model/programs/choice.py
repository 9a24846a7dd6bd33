"""Who computes a model: a program written for its build, or else transformers' own forward pass."""

from __future__ import annotations

import logging

import torch

from gralora_kernels.dispatch import AdapterBackend
from gralora_kernels.warmup import warm_up_backend
from gralora_runtime.errors import ConfigError
from gralora_runtime.model.description import OtherBuildError, describe
from gralora_runtime.model.loading import BaseModel
from gralora_runtime.model.programs.cpu import CpuRunner
from gralora_runtime.model.programs.runner import Runner, Served
from gralora_runtime.model.programs.transformers.runner import TransformersRunner

logger = logging.getLogger(__name__)


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
    return workspace_bytes(model, max_tokens=max_tokens, max_rows=max_rows, num_rungs=num_rungs)


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
    _compile_adapters(served)
    return TransformersRunner(served)


def _written_program(served: Served) -> Runner:
    if served.backend.name not in ("cpu", "triton"):
        raise OtherBuildError(f"kernel backend {served.backend.name!r} has no program")
    model = describe(served.base.model)
    if served.backend.name == "cpu":
        return CpuRunner(served, model)
    from gralora_runtime.model.programs.gpu.runner import GpuRunner  # needs triton

    _compile_adapters(served)  # for prompts: graphs are captured of single tokens
    return GpuRunner(served, model)


def _compile_adapters(served: Served) -> None:
    with served.stage("Kernels: adapters, tried"):
        warm_up_backend(served.backend, device=served.base.model.device, dtype=served.base.model.dtype)
