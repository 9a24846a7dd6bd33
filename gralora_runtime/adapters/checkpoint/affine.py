"""Gains and shifts of a module's outputs, from the vectors of its checkpoint and from the base layer. Knows no blob.

All of them are one form, y = gain * (y + what its matrices add) + shift, y being what the base layer gives with its own
bias. DoRA (arXiv 2402.09353) scales every output so that its weight's row, W + scale * B @ A, has a trained norm:
gain = magnitude / norm, and never the bias. A trained bias stands in the place of the base layer's. A norm's gains and
shifts are its weights and biases themselves, in the place of the base model's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from gralora_kernels.packing import Array
from gralora_runtime.adapters.checkpoint.plan import ModulePlan, Plan, Vector
from gralora_runtime.adapters.checkpoint.spec import LayerKind, rejected
from gralora_runtime.adapters.checkpoint.stored import ARRAYS, held, read_range
from gralora_runtime.adapters.checkpoint.tensors import TensorInfo


@dataclass(frozen=True, slots=True)
class BaseNorm:
    """It scales by (weight + offset) * factor, and then adds bias * factor."""

    weight: Array  # fp32 [out]
    bias: Array | None
    offset: float = 0.0
    factor: float = 1.0


class BaseLayers(Protocol):
    """What vectors and rows of an adapter are relative to."""

    def bias(self, module: str) -> Array | None:
        """fp32 [out]."""

    def factor(self, module: str) -> float:
        """That its output was scaled by before gains and shifts see it."""

    def norms(self, module: str, a: Array, b: Array) -> Array:
        """Of each row of W + b @ a, for fp32 a [r, in] and b [out, r]: float64 [out]."""

    def rows(self, module: str, first: int, count: int) -> Array:
        """Of W: fp32 [count, in]; of an embedding [count, hidden]."""

    def norm(self, module: str) -> BaseNorm:
        """Of a norm."""


@dataclass(frozen=True, slots=True)
class ModuleVectors:
    """One module's, in fp32, and the plain pair that magnitudes are of."""

    plan: ModulePlan
    values: Mapping[Vector, Array]  # [out] each
    a: Array | None  # [r, in]
    b: Array | None  # [out, r]


@dataclass(frozen=True, slots=True)
class Vectors:
    """All of a checkpoint's. `digests`: SHA-256 of the bytes of each, in the order of modules."""

    modules: Sequence[ModuleVectors]
    digests: Sequence[bytes]


def vectors_in(plan: Plan, tensors: Mapping[str, Array]) -> list[ModuleVectors]:
    """Of a checkpoint that follows its plan and has these tensors, in fp32."""
    found = []
    for module in (module for module in plan if module.vectors):
        values = {vector.kind: tensors[vector.name] for vector in module.vectors}
        pair = module.parts[0] if Vector.MAGNITUDES in values else None
        a, b = (tensors[pair.a_name], tensors[pair.b_name]) if pair else (None, None)
        found.append(ModuleVectors(module, values, a, b))
    return found


def read_vectors(file: int, plan: Plan, tensors: Mapping[str, TensorInfo]) -> Vectors:
    """Of a checkpoint that follows its plan. Raises MalformedError if the file is not what it was."""
    digests: list[bytes] = []
    values: dict[str, Array] = {}
    for module in (module for module in plan if module.vectors):
        for name in (vector.name for vector in module.vectors):
            values[name], digest = _fp32(file, tensors[name])
            digests.append(digest)
        if any(vector.kind is Vector.MAGNITUDES for vector in module.vectors):
            (pair,) = module.parts
            values |= {name: _fp32(file, tensors[name])[0] for name in (pair.a_name, pair.b_name)}
    return Vectors(vectors_in(plan, values), digests)


def affines_of(name: str, modules: Sequence[ModuleVectors], base: BaseLayers) -> dict[str, Array]:
    """By module: gains and shifts, fp32 [2, out]. Raises AdapterRejectedError if they are no finite numbers."""
    found = {vectors.plan.module.name: _affine(vectors, base) for vectors in modules}
    if problems := [
        f"module {module}: its trained {_listed(vectors)} make no finite numbers of this base model's weights"
        for (module, affine), vectors in zip(found.items(), modules, strict=True)
        if not np.isfinite(affine).all()
    ]:
        raise rejected(name, problems)
    return found


def _affine(vectors: ModuleVectors, base: BaseLayers) -> Array:
    module, values = vectors.plan.module, vectors.values
    if module.kind is LayerKind.NORM:
        return _of_norm(values, base.norm(module.name))
    affine: Array = np.zeros((2, module.out_features), np.float64)
    gains, shifts = affine
    gains[:] = 1.0
    if Vector.MAGNITUDES in values:
        assert vectors.a is not None
        assert vectors.b is not None
        (pair,) = vectors.plan.parts
        with np.errstate(divide="ignore", invalid="ignore"):
            scaled = vectors.b * np.float32(pair.part.scale)
            gains[:] = values[Vector.MAGNITUDES] / base.norms(module.name, vectors.a, scaled)
    bias = base.bias(module.name)
    if bias is not None:
        shifts += values.get(Vector.BIASES, bias) - gains * bias
    if Vector.B_BIASES in values:
        (pair,) = vectors.plan.parts
        shifts += pair.part.scale * values[Vector.B_BIASES]
    shifts *= base.factor(module.name)
    return affine.astype(np.float32)


def _of_norm(values: Mapping[Vector, Array], norm: BaseNorm) -> Array:
    gains = (values.get(Vector.NORM_WEIGHTS, norm.weight) + np.float32(norm.offset)) * np.float32(norm.factor)
    shifts = values.get(Vector.BIASES, norm.bias)
    shifts = np.zeros_like(gains) if shifts is None else shifts * np.float32(norm.factor)
    return np.stack([gains, shifts]).astype(np.float32)


def _listed(vectors: ModuleVectors) -> str:
    return " and ".join(kind.value for kind in vectors.values)


def _fp32(file: int, stored: TensorInfo) -> tuple[Array, bytes]:
    """A tensor, and the SHA-256 of its bytes."""
    data = read_range(file, stored.begin, stored.end)
    values = held(data.view(ARRAYS[stored.dtype]), stored.dtype, torch.float32)
    return values.reshape(stored.shape), hashlib.sha256(data.data).digest()
