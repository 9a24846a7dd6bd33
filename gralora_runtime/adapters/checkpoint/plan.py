"""What a config puts on which module of a base model, and what the tensors have to be called. Reads no file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from gralora_kernels.alignment import aligned, map_numel
from gralora_runtime.adapters.checkpoint.experts import wrapper_paths
from gralora_runtime.adapters.checkpoint.naming import (
    BIASES,
    ROWS,
    SAVED_AGAIN,
    UNDER_ROWS,
    UNDER_SAVED,
    WEIGHTS,
    Naming,
)
from gralora_runtime.adapters.checkpoint.spec import (
    ADDED,
    EMBEDDINGS,
    MAX_ADDED_OPTION,
    PARAMETERS,
    AdapterSpec,
    Biases,
    Dialect,
    LayerKind,
    ModuleShape,
    Part,
)
from gralora_runtime.adapters.checkpoint.targets import ALL_LINEAR, MatchingBudget
from gralora_runtime.adapters.checkpoint.vocabulary import Vocabulary, num_tokens

AFFINE_BYTES = 8  # of an output: a gain and a shift, in float32
_LINEAR = (LayerKind.LINEAR, LayerKind.HEAD)
_ENDS = {LayerKind.ADDED_EMBEDDING: LayerKind.EMBEDDING, LayerKind.ADDED_HEAD: LayerKind.HEAD}
_SAVE_ALL = "save_pretrained(DIR, save_embedding_layers=True) on the resized model brings them"


@dataclass(frozen=True, slots=True, kw_only=True)
class PartTensors:
    """The two tensors of one part on one module: their names in the checkpoint and the shapes they must have. Those of
    experts have a pair of this part for each. `features`: inputs and outputs of the module, where tensors have more
    those of added tokens are behind them."""

    part: Part
    experts: int = 1
    features: tuple[int, int]
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
    """Rows [rows, hidden] that stand in the place of an embedding's or an output head's, one for each of `tokens`.

    Those of added tokens are the rows from `first` on of what the checkpoint has for all tokens, `pair` is added to
    them, and some of `trained`, which has tokens, stand in their place.
    """

    name: str
    shape: tuple[int, int]
    tokens: tuple[int, ...] | None  # None: for all, in their order
    first: int = 0
    pair: PartTensors | None = None
    trained: RowsTensor | None = None

    @property
    def count(self) -> int:
        return self.shape[0] - self.first


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
        """Of the pair that changes an output head's rows into these: one for each row, or one for each input. That of
        added tokens has one for each, whose outputs are nobody else's."""
        if self.rows is None:
            return 0
        return self.rows.count if self.module.kind in ADDED else min(self.rows.count, self.module.in_features)

    @property
    def added_tokens(self) -> int:
        """That have a row here."""
        return self.rows.count if self.rows and self.module.kind in ADDED else 0

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
            if (trained := self.rows.trained) is not None:
                yield trained.name, trained.shape

    def extra_numel(self, element_bytes: int) -> int:
        """Elements of a pool that gains and shifts, and an embedding's rows, take."""
        numel = aligned(self.module.out_features * AFFINE_BYTES // element_bytes) if self.vectors else 0
        if self.rows and self.module.kind in EMBEDDINGS:
            rows_numel = self.rows.count * self.module.out_features
            numel += map_numel(self.module.in_features, element_bytes) + aligned(rows_numel)
        return numel

    def rows_pair_numel(self) -> tuple[int, int]:
        """Elements of a pool that the two matrices of `rows_rank` take."""
        if self.module.kind in EMBEDDINGS:
            return 0, 0
        return aligned(self.rows_rank * self.module.in_features), aligned(self.rows_rank * self.module.out_features)


Plan = tuple[ModulePlan, ...]


@dataclass(frozen=True, slots=True)
class Copy:
    """A tensor that may be there, and then has to be what the base model has, or the file's tensor `like`."""

    module: ModuleShape  # the base model's
    name: str
    shape: tuple[int, int]  # with rows of added tokens behind those of the base model's
    like: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Planned:
    """All of a config. Copies are an embedding's and an output head's, which PEFT saves beside pairs on them."""

    modules: Plan
    copies: tuple[Copy, ...]


def planned(
    spec: AdapterSpec, modules: Sequence[ModuleShape], naming: Naming, vocabulary: Vocabulary | None = None
) -> Planned:
    """The config speaks of modules by their paths in the model that the adapter was trained in. `vocabulary`: the
    adapter's, where it has more tokens than the base model.

    Raises `SlowPatternError`.
    """
    planner = _Planner(spec, modules, naming, vocabulary)
    return Planned(tuple(filter(None, map(planner.module, modules))), tuple(planner.copies))


def weight_shape(module: ModuleShape) -> tuple[int, int]:
    """As a checkpoint has it: of an embedding a row a token, of a linear layer a row an output."""
    shape = module.in_features, module.out_features
    return shape if module.kind in EMBEDDINGS else shape[::-1]


def room_numel(numel: int, share: int) -> int:
    """Elements of a pool from the start of a matrix to that of the next, if one holds `share` of the matrix's."""
    return aligned(-(-numel // share))


class _Planner:
    """One config over the modules of one model."""

    def __init__(
        self, spec: AdapterSpec, modules: Sequence[ModuleShape], naming: Naming, vocabulary: Vocabulary | None
    ) -> None:
        self._vocabulary = vocabulary
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
            if module.kind not in (*PARAMETERS, *ADDED) and self._paths[module.name].endswith(spec.saved)
        }
        self._tied = self._tied_modules() if spec.ties else frozenset()
        if self._saved & self._tied:
            self._saved |= self._tied
        self._tokens = dict(self._token_rows())

    def module(self, module: ModuleShape) -> ModulePlan | None:
        """None: nothing."""
        if module.kind in ADDED:
            return None if self._vocabulary is None else self._added(module, self._vocabulary)
        path = self._paths[module.name]
        saved, rows = module.name in self._saved, self._tokens.get(module.name)
        # PEFT leaves out of its targets what is saved as a whole.
        targeted = not saved and self._targets(module, path)
        parts = tuple(self._parts(module, path)) if targeted else ()
        if saved and module.kind is not LayerKind.NORM:
            rows = RowsTensor(
                name=self._naming.tensor(path, WEIGHTS[1]), shape=weight_shape(self._in_training(module)), tokens=None
            )
        self.copies += self._copies(module, path, saved=saved, has_pair=bool(parts))
        vectors = tuple(self._vectors(module, path, targeted=targeted, saved=saved))
        if not (parts or vectors or rows):
            return None
        unserved = self._unserved(module, targeted=targeted, rows=rows)
        unserved = unserved or _beyond_vocabulary(self._in_training(module), rows)
        return ModulePlan(module=module, parts=parts, vectors=vectors, rows=rows, unserved=unserved)

    def _in_training(self, module: ModuleShape) -> ModuleShape:
        """As wide as it was there."""
        if self._vocabulary is None:
            return module
        if module.kind is LayerKind.EMBEDDING:
            return replace(module, in_features=self._vocabulary.size)
        return replace(module, out_features=self._vocabulary.size) if module.kind is LayerKind.HEAD else module

    def _copies(self, module: ModuleShape, path: str, *, saved: bool, has_pair: bool) -> Iterator[Copy]:
        """PEFT saves all that an embedding or a head consists of, beside what was trained of it."""
        if module.transposed or module.kind in PARAMETERS:
            return
        is_end = module.kind in (LayerKind.HEAD, LayerKind.EMBEDDING)
        shape = weight_shape(self._in_training(module))

        def copy(matrix: str, like: str = "") -> Copy:
            return Copy(module, self._naming.tensor(path, matrix), shape, like and self._naming.tensor(path, like))

        if not saved and (has_pair or is_end):
            yield copy(WEIGHTS[not has_pair])
        if saved and is_end:
            yield copy(UNDER_SAVED)
            yield copy(SAVED_AGAIN, like=WEIGHTS[1])
        if (rows := self._tokens.get(module.name)) is not None:
            yield copy(UNDER_ROWS)
            if (own := self._naming.tensor(path, ROWS)) != rows.name:  # tied, and the same
                yield Copy(module, own, rows.shape, like=rows.name)

    def _added(self, added: ModuleShape, vocabulary: Vocabulary) -> ModulePlan:
        """Rows of tokens that the base model does not have."""
        module = self._by_kind[_ENDS[added.kind]]
        path, first = self._paths[module.name], num_tokens(module)
        targeted = module.name not in self._saved and self._targets(module, path)
        pair = next(self._parts(module, path), None) if targeted else None
        rows = RowsTensor(
            name=self._brought(module, vocabulary),
            shape=weight_shape(self._in_training(module)),
            tokens=None,
            first=first,
            pair=pair,
            trained=None if module.name in self._saved else self._tokens.get(module.name),
        )
        return ModulePlan(module=added, rows=rows, unserved=self._unserved_rows(added, module, rows, vocabulary))

    def _brought(self, module: ModuleShape, vocabulary: Vocabulary) -> str:
        """The tensor that has a row of it for each token."""
        names = [self._weights_of(module)]
        if module.tied_to or self._by_kind[LayerKind.HEAD].tied_to == module.name:
            both = (self._by_kind[kind] for kind in _ENDS.values())
            names += [self._weights_of(other) for other in both if other.name not in self._saved]
        return next((name for name in names if name in vocabulary.tensors), names[0])

    def _weights_of(self, module: ModuleShape) -> str:
        """What the checkpoint calls those that it is served with, before pairs and rows of some tokens."""
        path = self._paths[module.name]
        if module.name in self._saved:
            return self._naming.tensor(path, WEIGHTS[1])
        if module.name in self._tokens:
            return self._naming.tensor(path, UNDER_ROWS)
        return self._naming.tensor(path, WEIGHTS[not self._targets(module, path)])

    def _unserved_rows(self, added: ModuleShape, module: ModuleShape, rows: RowsTensor, vocabulary: Vocabulary) -> str:
        most = added.in_features - 1 if added.kind is LayerKind.ADDED_EMBEDDING else added.out_features
        spec, more = self._spec, f"{vocabulary.size} tokens, {rows.count} more than the base model"
        if rows.count > most:
            return f"it has {more}: this server takes at most {most} ({MAX_ADDED_OPTION})"
        if spec.invocation:
            return f"it has {more}, which is not served of an adapter that begins at tokens of the prompt"
        if rows.pair and (spec.dialect is not Dialect.LORA or spec.use_dora or spec.lora_bias):
            return f"it has {more}, and then nothing but a plain LoRA is served on the {module.kind}"
        if module.has_bias:
            return f"it has {more}, which is not served beside biases of the {module.kind}"
        if rows.name not in vocabulary.tensors:
            return f"it has {more}, whose rows ({rows.name}) are not in the file: {_SAVE_ALL}"
        return ""

    def _tied_modules(self) -> frozenset[str]:
        """The embedding and its output head, if those are tied."""
        head = self._by_kind.get(LayerKind.HEAD)
        return frozenset((head.name, head.tied_to)) if head and head.tied_to else frozenset()

    def _targets(self, module: ModuleShape, path: str) -> bool:
        """Norms are no targets, and an embedding is not one of all linear layers. Nor are added tokens' rows."""
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
            rank, whole = part.r * module.experts, self._in_training(module)
            a_shape: tuple[int, ...] = (rank, whole.in_features)
            b_shape: tuple[int, ...] = (whole.out_features, rank)
            if is_lora and module.kind is LayerKind.EMBEDDING:
                names = ("lora_embedding_A", "lora_embedding_B")
            elif is_lora:
                names = ("lora_A.weight", "lora_B.weight")
            elif index > 0:
                names = ("gralora_A_general.weight", "gralora_B_general.weight")
            else:
                names = ("gralora_A", "gralora_B")
                a_shape = (part.k, whole.in_features // part.k, part.r)
                b_shape = (part.k, part.r, whole.out_features // part.k)
            named = self._wrappers.get(path, path)
            a_name, b_name = (self._naming.tensor(named, matrix) for matrix in names)
            yield PartTensors(
                part=part,
                experts=module.experts,
                features=(module.in_features, module.out_features),
                a_name=a_name,
                a_shape=a_shape,
                b_name=b_name,
                b_shape=b_shape,
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
                yield VectorTensor(
                    kind=kind, name=self._naming.tensor(path, matrix), shape=(self._in_training(module).out_features,)
                )

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
        return f"{beyond[0]} is not a token id of this model (0 to {size - 1}); if it was added, {_SAVE_ALL}"
    return ""
