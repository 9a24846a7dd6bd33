"""Reads all of an adapter directory, its tensors as they are stored, for tools that rewrite or compare adapters.

Serving does not come here: it packs each tensor while it reads (`loader`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gralora_runtime.adapters.checkpoint.bounds import largest_magnitude
from gralora_runtime.adapters.checkpoint.file import MalformedError, open_regular
from gralora_runtime.adapters.checkpoint.header import AdapterHeader, inspect, read_config
from gralora_runtime.adapters.checkpoint.implied import implied_shapes
from gralora_runtime.adapters.checkpoint.loader import check_unchanged, digest_of
from gralora_runtime.adapters.checkpoint.plan import Plan, Vector
from gralora_runtime.adapters.checkpoint.recipe import TORCH_DTYPES, describe
from gralora_runtime.adapters.checkpoint.spec import ModuleShape, parse_config, rejected
from gralora_runtime.adapters.checkpoint.stored import ARRAYS, read_range
from gralora_runtime.adapters.checkpoint.tensors import WEIGHTS_FILE, TensorInfo
from gralora_runtime.adapters.checkpoint.update import Update, update_of


@dataclass(frozen=True, slots=True, kw_only=True)
class WholeAdapter:
    """A checkpoint that is sound: its config asks for what its tensors are, and all values are finite."""

    header: AdapterHeader
    config: Mapping[str, Any]  # as it stands in the file
    plan: Plan
    tensors: Mapping[str, Tensor]  # as they stand in the file
    digest: str  # the loader's, if `plan` is of a model's modules; else comparable among those that are not, too

    def updates(self) -> dict[str, Update]:
        """What its matrices add to which module."""
        return {module.module.name: update_of(module, self.tensors) for module in self.plan if module.parts}

    @property
    def brings_more(self) -> bool:
        """Than updates."""
        return any(module.vectors or module.rows for module in self.plan)

    @property
    def vectors(self) -> tuple[Vector, ...]:
        """Which kinds it has beside its matrices."""
        return tuple(kind for kind in Vector if any(vector.kind is kind for one in self.plan for vector in one.vectors))


def read_whole(
    path: Path,
    modules: Sequence[ModuleShape] | None = None,
    *,
    roots: Sequence[Path] = (),
    allowed_keys: Collection[str] = (),
) -> WholeAdapter:
    """Read and check an adapter, or raise AdapterRejectedError with every reason.

    `modules`: of the base model. Without them, the adapter's own tensors say how wide its modules are. `allowed_keys`:
    see `parse_config`.
    """
    header = inspect(path, roots=roots, allowed_keys=allowed_keys)
    if modules is None and header.spec.targets.parameters:
        raise rejected(
            header.name,
            ["target_parameters: which of its tensors are for which experts is to be told beside the base model alone"],
        )
    plan = header.fitting_plan(implied_shapes(header) if modules is None else modules)
    names = [name for module in plan for pair in module.parts for name in (pair.a_name, pair.b_name)]
    names += [vector.name for module in plan for vector in module.vectors]
    names += [module.rows.name for module in plan if module.rows]
    try:
        config = read_config(path, roots)
        if parse_config(header.name, config, allowed_keys) != header.spec:
            raise rejected(header.name, ["its config changed while it was being read"])
        with open_regular(path, WEIGHTS_FILE, roots) as opened:
            check_unchanged(opened, header)
            arrays = {name: _array(opened.fileno(), header.tensors[name]) for name in names}
    except MalformedError as cause:
        raise rejected(header.name, [str(cause)]) from cause
    largest = torch.finfo(torch.float32).max
    if problems := [
        f"tensor {name} has values that are not finite in float32"
        for name, values in arrays.items()
        if largest_magnitude(values, header.tensors[name].dtype) > largest
    ]:
        raise rejected(header.name, problems)
    digest = digest_of(
        describe(plan, header.tensors),
        [hashlib.sha256(arrays[name].data).digest() for name in names],
        header.spec.invocation,
    )
    tensors = {name: _tensor(values, header.tensors[name]) for name, values in arrays.items()}
    return WholeAdapter(header=header, config=config, plan=plan, tensors=tensors, digest=digest)


def _array(file: int, stored: TensorInfo) -> np.ndarray[Any, np.dtype[Any]]:
    return read_range(file, stored.begin, stored.end).view(ARRAYS[stored.dtype])


def _tensor(values: np.ndarray[Any, np.dtype[Any]], stored: TensorInfo) -> Tensor:
    return torch.from_numpy(values).view(TORCH_DTYPES[stored.dtype]).view(stored.shape)
