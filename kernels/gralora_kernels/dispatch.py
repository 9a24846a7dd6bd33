"""Chooses how adapters are applied, once, at start. Imports a backend only when it is the chosen one."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Protocol

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from gralora_kernels.grouping import Grouping
from gralora_kernels.packing import Packing
from gralora_kernels.tables import GroupTable

logger = logging.getLogger(__name__)

BACKENDS = ("reference", "cpu", "triton")
OLDEST = {"torch": "2.9", "triton": "3.4"}  # that a GPU is served with, as pyproject.toml says


class AdapterBackend(Protocol):
    """One way to compute y += adapter(x) for a whole step."""

    name: str
    packing: Packing  # how it wants matrices to lie in the arena

    def prepare(self, groups: Sequence[GroupTable], grouping: Grouping) -> None:
        """Before the first `apply` of a step, with every group of the model: what all layers share is made here."""

    def apply(self, y: Tensor, x: Tensor, arena: Tensor, group: GroupTable, grouping: Grouping) -> None:
        """y [tokens, sum(out)] += adapter(x [tokens, in]), in place; rows of slot -1 are not touched at all."""

    def look_up(
        self, y: Tensor, ids: Tensor, arena: Tensor, group: GroupTable, grouping: Grouping, *, factor: float
    ) -> None:
        """What adapters make of y [tokens, hidden], which is `factor` times an embedding's rows of int64 ids [tokens],
        or int32 on a GPU.

        `group` is the embedding's. A row that stands in the place of the base model's is put over it; pairs add B times
        the column of A that an id names. Both times `factor`, in place; rows of slot -1 are not touched at all.
        """


def resolve_backend(name: str, device: torch.device) -> AdapterBackend:
    """The backend called `name`; "auto" is triton on a GPU and cpu on a CPU.

    ValueError: there is no such backend, or it cannot run on this device. RuntimeError: what it needs is not installed.
    """
    chosen = name if name != "auto" else ("cpu" if device.type == "cpu" else "triton")
    if chosen not in BACKENDS:
        raise ValueError(f"backend must be one of auto, {', '.join(BACKENDS)}, got {name!r}")
    backend = build_backend(chosen, device)
    logger.info("adapter kernels: %s on %s (asked for: %s)", backend.name, device, name)
    return backend


def build_backend(name: str, device: torch.device) -> AdapterBackend:
    """One of `BACKENDS`, with memory of its own. Raises as `resolve_backend` does."""
    if name == "cpu":
        if device.type != "cpu":
            raise ValueError(f"backend 'cpu' cannot serve device {device}")
        return _build_cpu()
    if name == "triton":
        return _build_triton(device)
    from gralora_kernels.reference.adapters import ReferenceBackend

    return ReferenceBackend()


def _build_cpu() -> AdapterBackend:
    try:
        from gralora_kernels.cpu.backend import CpuBackend
    except ImportError as cause:
        raise RuntimeError(f"backend 'cpu' needs numba: {cause}") from cause
    return CpuBackend()


def _build_triton(device: torch.device) -> AdapterBackend:
    for package, least in OLDEST.items():
        found = _version(package)
        if found is not None and TorchVersion(found) < TorchVersion(least):
            raise RuntimeError(f"backend 'triton' needs {package} {least} or later, this is {found}")
    try:
        from gralora_kernels.triton_ops.adapters.launch import TritonBackend
    except ImportError as cause:
        raise RuntimeError(f"backend 'triton' needs the package triton: {cause}") from cause
    return TritonBackend(device)


def _version(package: str) -> str | None:
    """None: whoever needs it will say so."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
