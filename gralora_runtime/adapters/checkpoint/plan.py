"""What a config puts on which module of a base model, and what the tensors have to be called. Reads no file."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from gralora_kernels.alignment import aligned, map_numel
from gralora_runtime.adapters.checkpoint.experts import wrapper_paths
from gralora_runtime.adapters.checkpoint.naming import BIASES, ROWS, WEIGHTS, Naming
from gralora_runtime.adapters.checkpoint.spec import (
    PARAMETERS,
    AdapterSpec,
    Biases,
    Dialect,
    LayerKind,
    ModuleShape,
    Part,
)
from gralora_runtime.adapters.checkpoint.targets import ALL_LINEAR, MatchingBudget

AFFINE_BYTES = 8  # of an output: a gain and a shift, in float32
_LINEAR = (LayerKind.LINEAR, LayerKind.HEAD)


@dataclass(frozen=True, slots=True, kw_only=True)
class PartTensors:
    """The two tensors of one part on one module: their names in the checkpoint and the shapes they must have. Those of
    experts have a pair of this part for each."""

    part: Part
    experts: int = 1
    a_name: str
    a_shape: tuple[int, ...]
    b_name: str
    b_shape: tuple[int, ...]


class Vector(StrEnum):
    """What a vector [out] of a checkpoint is to its module."""

    MAGNITUDES = "magnitudes"  # DoRA's: the norms of the rows of its weight, whatever they were
    B_BIASES = "biases of B"  # come on top, times the adapter's scale
    BIASES = "biases"  # in the place of the base layer's
    NORM_WEIGHTS = "weights of norms"  # the same


@dataclass(frozen=True, slots=True, kw_only=True)
class VectorTensor:
    """One vector: what it is, its name in the checkpoint and the shape it must have."""

    kind: Vector
    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RowsTensor:
    """Rows [rows, hidden] that stand in the place of an embedding's or an output head's, one for each of `tokens`."""

    name: str
    shape: tuple[int, int]
    tokens: tuple[int, ...] | None  # None: for all, in their order

    @property
    def count(self) -> int:
        return self.shape[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModulePlan:
    """What an adapter puts on one module of the base model."""

    module: ModuleShape
    parts: tuple[PartTensors, ...] = ()
    vectors: tuple[VectorTensor, ...] = ()
    rows: RowsTensor | None = None
    unserved: str = ""  # why none of it is served

    @property
    def width(self) -> int:
        """Columns of the kernels' intermediate result; also the rank of an exact plain LoRA for this module."""
        return sum(tensors.part.r * tensors.part.k for tensors in self.parts)

    @property
    def replaces(self) -> bool:
        """Whether something of it stands in the place of the base model's weights."""
        return self.rows is not None or any(vector.kind is Vector.NORM_WEIGHTS for vector in self.vectors)

    @property
    def is_whole(self) -> bool:
        """It was trained as a whole."""
        return self.replaces and (self.rows is None or self.rows.tokens is None)

    @property
    def rows_rank(self) -> int:
        """Of the pair that changes an output head's rows into these: one for each row, or one for each input."""
        return min(self.rows.count, self.module.in_features) if self.rows else 0

    @property
    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes of all."""
        for pair in self.parts:
            yield pair.a_name, pair.a_shape
            yield pair.b_name, pair.b_shape
        for vector in self.vectors:
            yield vector.name, vector.shape
        if self.rows:
            yield self.rows.name, self.rows.shape

    def extra_numel(self, element_bytes: int) -> int:
        """Elements of a pool that gains and shifts, and an embedding's rows, take."""
        numel = aligned(self.module.out_features * AFFINE_BYTES // element_bytes) if self.vectors else 0
        if self.rows and self.module.kind is LayerKind.EMBEDDING:
            numel += map_numel(self.module.in_features, element_bytes) + aligned(math.prod(self.rows.shape))
        return numel

    def rows_pair_numel(self) -> tuple[int, int]:
        """Elements of a pool that the two matrices of `rows_rank` take."""
        if self.module.kind is LayerKind.EMBEDDING:
            return 0, 0
        return aligned(self.rows_rank * self.module.in_features), aligned(self.rows_rank * self.module.out_features)


Plan = tuple[ModulePlan, ...]


@dataclass(frozen=True, slots=True)
class Copy:
    """A tensor that may be there, and then has to be what the base model has."""

    module: ModuleShape
    name: str


@dataclass(frozen=True, slots=True, eq=False)
class Planned:
    """All of a config. Copies are an embedding's and an output head's, which PEFT saves beside pairs on them."""

    modules: Plan
    copies: tuple[Copy, ...]


def planned(spec: AdapterSpec, modules: Sequence[ModuleShape], naming: Naming) -> Planned:
    """The config speaks of modules by their paths in the model that the adapter was trained in.

    Raises `SlowPatternError`.
    """
    planner = _Planner(spec, modules, naming)
    return Planned(tuple(filter(None, map(planner.module, modules))), tuple(planner.copies))


def weight_shape(module: ModuleShape) -> tuple[int, int]:
    """As a checkpoint has it: of an embedding a row a token, of a linear layer a row an output."""
    shape = module.in_features, module.out_features
    return shape if module.kind is LayerKind.EMBEDDING else shape[::-1]


def room_numel(numel: int, share: int) -> int:
    """Elements of a pool from the start of a matrix to that of the next, if one holds `share` of the matrix's."""
    return aligned(-(-numel // share))


class _Planner:
    """One config over the modules of one model."""

    def __init__(self, spec: AdapterSpec, modules: Sequence[ModuleShape], naming: Naming) -> None:
        self.copies: list[Copy] = []
        self._spec = spec
        self._naming = naming
        self._budget = MatchingBudget()
        self._paths = {module.name: naming.path(module.name) for module in modules}
        self._by_kind = {module.kind: module for module in modules}
        parameters = [self._paths[module.name] for module in modules if module.kind in PARAMETERS]
        self._wrappers = wrapper_paths(filter(spec.targets.matches_parameter, parameters))
        self._saved = {
            module.name
            for module in modules
            if module.kind not in PARAMETERS and self._paths[module.name].endswith(spec.saved)
        }
        self._tied = self._tied_modules() if spec.ties else frozenset()
        if self._saved & self._tied:
            self._saved |= self._tied
        self._tokens = dict(self._token_rows())

    def module(self, module: ModuleShape) -> ModulePlan | None:
        """None: nothing."""
        path = self._paths[module.name]
        saved, rows = module.name in self._saved, self._tokens.get(module.name)
        # PEFT leaves out of its targets what is saved as a whole.
        targeted = not saved and self._targets(module, path)
        parts = tuple(self._parts(module, path)) if targeted else ()
        if saved and module.kind is not LayerKind.NORM:
            rows = RowsTensor(name=self._naming.tensor(path, WEIGHTS[1]), shape=weight_shape(module), tokens=None)
        may_be_copied = not (saved or module.transposed or module.kind in PARAMETERS)
        if may_be_copied and (parts or module.kind in (LayerKind.HEAD, LayerKind.EMBEDDING)):
            self.copies.append(Copy(module, self._naming.tensor(path, WEIGHTS[not parts])))
        vectors = tuple(self._vectors(module, path, targeted=targeted, saved=saved))
        if not (parts or vectors or rows):
            return None
        unserved = self._unserved(module, targeted=targeted, rows=rows) or _beyond_vocabulary(module, rows)
        return ModulePlan(module=module, parts=parts, vectors=vectors, rows=rows, unserved=unserved)

    def _tied_modules(self) -> frozenset[str]:
        """The embedding and its output head, if those are tied."""
        head = self._by_kind.get(LayerKind.HEAD)
        return frozenset((head.name, head.tied_to)) if head and head.tied_to else frozenset()

    def _targets(self, module: ModuleShape, path: str) -> bool:
        """Norms are no targets, and an embedding is not one of all linear layers."""
        if module.kind in PARAMETERS:
            return path in self._wrappers
        rule = self._spec.targets
        is_one = module.kind in _LINEAR or (
            module.kind is LayerKind.EMBEDDING and rule.target_modules is not ALL_LINEAR
        )
        return is_one and rule.matches(path, self._budget)

    def _parts(self, module: ModuleShape, path: str) -> Iterator[PartTensors]:
        is_lora = self._spec.dialect is Dialect.LORA
        for index, part in enumerate(self._spec.parts(path, self._budget)):
            rank = part.r * module.experts
            a_shape: tuple[int, ...] = (rank, module.in_features)
            b_shape: tuple[int, ...] = (module.out_features, rank)
            if is_lora and module.kind is LayerKind.EMBEDDING:
                names = ("lora_embedding_A", "lora_embedding_B")
            elif is_lora:
                names = ("lora_A.weight", "lora_B.weight")
            elif index > 0:
                names = ("gralora_A_general.weight", "gralora_B_general.weight")
            else:
                names = ("gralora_A", "gralora_B")
                a_shape = (part.k, module.in_features // part.k, part.r)
                b_shape = (part.k, part.r, module.out_features // part.k)
            named = self._wrappers.get(path, path)
            a_name, b_name = (self._naming.tensor(named, matrix) for matrix in names)
            yield PartTensors(
                part=part, experts=module.experts, a_name=a_name, a_shape=a_shape, b_name=b_name, b_shape=b_shape
            )

    def _vectors(self, module: ModuleShape, path: str, *, targeted: bool, saved: bool) -> Iterator[VectorTensor]:
        spec = self._spec
        has_own_bias = saved or spec.biases is Biases.ALL or (targeted and spec.biases is Biases.TARGETED)
        wanted = {
            Vector.MAGNITUDES: (targeted and spec.use_dora, "lora_magnitude_vector"),
            Vector.B_BIASES: (targeted and spec.lora_bias, "lora_B.bias"),
            Vector.BIASES: (module.has_bias and has_own_bias, BIASES[not targeted]),
            Vector.NORM_WEIGHTS: (saved and module.kind is LayerKind.NORM, WEIGHTS[1]),
        }
        for kind, (is_there, matrix) in wanted.items():
            if is_there:
                yield VectorTensor(kind=kind, name=self._naming.tensor(path, matrix), shape=(module.out_features,))

    def _token_rows(self) -> Iterator[tuple[str, RowsTensor]]:
        """By module. PEFT gives an output head that is tied to the embedding what the embedding has, unless it has
        other tokens of its own."""
        found: dict[str, RowsTensor] = {}
        embedding, head = (self._by_kind.get(kind) for kind in (LayerKind.EMBEDDING, LayerKind.HEAD))
        for module in (embedding, head):
            for rows in self._spec.token_rows:
                if module and (self._paths[module.name].endswith(rows.module) if rows.module else module is embedding):
                    name = self._naming.tensor(self._paths[module.name], ROWS)
                    hidden = module.out_features if module is embedding else module.in_features
                    found[module.name] = RowsTensor(name=name, shape=(len(rows.tokens), hidden), tokens=rows.tokens)
        if embedding and head and head.tied_to and (own := found.get(embedding.name)):
            others = found.get(head.name)
            if others is None or others.tokens == own.tokens:
                found[head.name] = own
        yield from found.items()

    def _unserved(self, module: ModuleShape, *, targeted: bool, rows: RowsTensor | None) -> str:
        if targeted and module.name in self._tied:
            return "a low-rank pair that is tied (ensure_weight_tying) is not served"
        if targeted and rows:
            return f"a low-rank pair beside trained rows of the same {module.kind} is not served"
        if rows and module.kind is LayerKind.LINEAR:
            return "trained as a whole, it is not served: of whole modules, embeddings, output heads and norms are"
        if targeted and module.kind is LayerKind.EMBEDDING:
            if self._spec.dialect is not Dialect.LORA:
                return "blocks on an embedding are not served, as PEFT has none"
            if self._spec.use_dora or self._spec.lora_bias or self._spec.invocation:
                return "on an embedding nothing but a plain LoRA is served"
        return ""


def _beyond_vocabulary(module: ModuleShape, rows: RowsTensor | None) -> str:
    """ "": nothing is."""
    size = weight_shape(module)[0]
    if rows and rows.tokens and (beyond := [token for token in rows.tokens if token >= size]):
        return f"{beyond[0]} is not a token id of this model (0 to {size - 1})"
    return ""
