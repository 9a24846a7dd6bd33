"""An adapter directory without its weights: config, tensor names, shapes and sizes, held against a base model's layers.

Reads the JSON config and the safetensors header only, in plain Python: no torch, and nothing from the file is executed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from gralora_runtime.adapters.checkpoint.file import (
    MalformedError,
    MissingFileError,
    open_regular,
    parse_object,
    read_text,
)
from gralora_runtime.adapters.checkpoint.mending import name_instead, save_as_safetensors
from gralora_runtime.adapters.checkpoint.naming import BASE_WEIGHT, BIASES, Naming, naming_for, spelling, take_apart
from gralora_runtime.adapters.checkpoint.remembered import remembered
from gralora_runtime.adapters.checkpoint.spec import (
    AdapterSpec,
    Biases,
    Dialect,
    ModuleShape,
    Part,
    clipped,
    parse_config,
    rejected,
)
from gralora_runtime.adapters.checkpoint.targets import MATCHING_BUDGET_S, MatchingBudget, SlowPatternError
from gralora_runtime.adapters.checkpoint.tensors import DTYPES, WEIGHTS_FILE, TensorInfo, parse_header, read_header

CONFIG_FILE = "adapter_config.json"
GOLDEN_FILE = "golden.json"
PICKLE_FILE = "adapter_model.bin"
MAX_CONFIG_BYTES = 1 << 20
MAX_CONFIG_VALUES = 1 << 17
MAX_KEPT_CONFIG_BYTES = 64 << 10  # a plan is kept together with its config: as for headers, not with a huge one
ALIGNMENT = 16  # elements between the starts of two packed matrices
MAX_EXAMPLES = 2  # names of each side, where no name of one is the other's
MAX_EXAMPLE_CHARS = 200
_FIRST_MATRICES = ("gralora_A", "lora_A.weight")
_NOT_SERVED = {
    ".lora_embedding_": "is of an adapter on an embedding, which is not served",
    ".trainable_tokens_": "has trained rows of an embedding, which are not served",
}
AFFINE_BYTES = 2 * DTYPES["F32"]  # of an output: a gain and a shift


@dataclass(frozen=True, slots=True, kw_only=True)
class PartTensors:
    """The two tensors of one part on one module: their names in the checkpoint and the shapes they must have."""

    part: Part
    a_name: str
    a_shape: tuple[int, ...]
    b_name: str
    b_shape: tuple[int, ...]


class Vector(StrEnum):
    """What a vector [out] of a checkpoint is to its module."""

    MAGNITUDES = "magnitudes"  # DoRA's: the norms of the rows of its weight, whatever they were
    B_BIASES = "biases of B"  # come on top, times the adapter's scale
    BIASES = "biases"  # in the place of the base layer's


@dataclass(frozen=True, slots=True, kw_only=True)
class VectorTensor:
    """One vector: what it is, its name in the checkpoint and the shape it must have."""

    kind: Vector
    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModulePlan:
    """What an adapter puts on one module of the base model. Without parts: nothing but a bias."""

    module: ModuleShape
    parts: tuple[PartTensors, ...]
    vectors: tuple[VectorTensor, ...] = ()
    base_weight: str = ""  # a tensor that may be there, and then has to be what the base model has

    @property
    def width(self) -> int:
        """Columns of the kernels' intermediate result; also the rank of an exact plain LoRA for this module."""
        return sum(tensors.part.r * tensors.part.k for tensors in self.parts)


Plan = tuple[ModulePlan, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSummary:
    """An adapter in a few numbers, for lists. Ranks are maxima where they differ from module to module."""

    dialect: Dialect
    rank: int  # of the blocks; a hybrid's plain part comes on top
    blocks: int
    hybrid_rank: int
    equivalent_rank: int  # of an exact plain LoRA
    scale: float
    num_modules: int
    tensor_bytes: int  # in the file
    packed_numel: int  # elements of a pool
    base_model: str
    notes: tuple[str, ...] = ()  # see `AdapterSpec`
    invocation: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterHeader:
    """A checkpoint's config and tensor list, each sound in itself. Whether they suit a base model is `fits`."""

    name: str
    spec: AdapterSpec
    tensors: Mapping[str, TensorInfo]
    fingerprint: int  # of the raw header: tells two versions of the file apart while it is being read
    config_bytes: int

    @property
    def dialect(self) -> Dialect:
        return self.spec.dialect

    @property
    def rank(self) -> int:
        return self.spec.rank

    @property
    def blocks(self) -> int:
        return self.spec.blocks

    @property
    def hybrid_rank(self) -> int:
        return self.spec.hybrid_rank

    @property
    def targets(self) -> tuple[str, ...]:
        """The modules for which the checkpoint has tensors of a low-rank pair, by their paths where it was trained."""
        naming = self.naming()
        names = (name for name in map(take_apart, self.tensors) if name is not None)
        found = (naming.module(name) for name in names if name.adapter is not None)
        return tuple(sorted({module for module in found if module is not None}))

    @property
    def tensor_bytes(self) -> int:
        return _tensor_bytes(self.tensors)

    @property
    def file_bytes(self) -> int:
        return max((tensor.end for tensor in self.tensors.values()), default=0)

    @property
    def equivalent_rank(self) -> int:
        """Rank of the plain LoRA that would compute exactly the same: k * r + hybrid_r, the largest of all modules."""
        shapes = [ModuleShape(module, 0, 0) for module in self.targets]
        return max((module.width for module in self.plan(shapes)), default=0)

    def naming(self, modules: Sequence[ModuleShape] = ()) -> Naming:
        """How its tensors are called, held against a base model's modules if there are any."""
        return _naming(self.tensors, tuple(modules))

    def plan(self, modules: Sequence[ModuleShape]) -> Plan:
        """What the config puts on which of these modules, whether or not the tensors are there."""
        try:
            plan = _plan_once if self.config_bytes <= MAX_KEPT_CONFIG_BYTES else _plan
            return plan(
                replace(self.spec, base_model="", notes=(), invocation=()), tuple(modules), self.naming(modules)
            )
        except SlowPatternError as cause:
            problem = f"its patterns take more than {MATCHING_BUDGET_S:.0f} s to match"
            raise rejected(self.name, [problem]) from cause

    def fits(self, modules: Sequence[ModuleShape]) -> list[str]:
        """Everything that keeps this adapter from being served on a base model with these modules."""
        return self._problems(self.plan(modules), modules)

    def fitting_plan(self, modules: Sequence[ModuleShape]) -> Plan:
        """The plan, or AdapterRejectedError with every reason why the checkpoint cannot follow it."""
        plan = self.plan(modules)
        if not _fits(self.tensors, plan):
            raise rejected(self.name, self._problems(plan, modules))
        return plan

    def cpu_pool_bytes(self, modules: Sequence[ModuleShape]) -> int:
        """What an adapter that fits these modules takes in a pool on the CPU: fp32, but for what comes in 16 bits."""
        plan = self.plan(modules)
        return DTYPES["F32"] * _packed_numel(plan, self.tensors, keeps_16_bit=True, element_bytes=DTYPES["F32"])

    def summary(
        self, modules: Sequence[ModuleShape], *, keeps_16_bit: bool = False, element_bytes: int = DTYPES["F32"]
    ) -> AdapterSummary:
        """Only for an adapter that fits these modules. `keeps_16_bit`: see `gralora_kernels.packing`. `element_bytes`:
        of the pool."""
        return _summary(self.tensors, self.plan(modules), self.spec, keeps_16_bit, element_bytes)

    def _problems(self, plan: Plan, modules: Sequence[ModuleShape]) -> list[str]:
        problems = list(_problems(plan, self.tensors, modules, self.naming(modules)))
        if problems and self.spec.base_model:
            problems.insert(0, f"it was trained for the base model {self.spec.base_model!r}")
        if not _matches(plan, self.tensors):
            problems.insert(0, f"it matches no module of the base model{_examples(self.tensors, modules)}")
        return problems


def inspect(
    path: Path, *, name: str = "", roots: Sequence[Path] = (), allowed_keys: Collection[str] = ()
) -> AdapterHeader:
    """Read an adapter directory's config and header. Files that leave `roots` through a link are refused.

    `allowed_keys`: see `parse_config`.
    """
    name = name or path.name
    try:
        config = _read_config(path, roots)
        spec = parse_config(name, parse_object(CONFIG_FILE, config, max_values=MAX_CONFIG_VALUES), allowed_keys)
        header, file_bytes = _read_header(path, roots)
        tensors = parse_header(header, file_bytes)
    except MalformedError as cause:
        raise rejected(name, [str(cause)]) from cause
    return AdapterHeader(name=name, spec=spec, tensors=tensors, fingerprint=hash(header), config_bytes=len(config))


def files_stamp(path: Path) -> tuple[tuple[int, ...], ...]:
    """Changes whenever one of an adapter directory's files does, is exchanged, comes or goes."""
    stamps: list[tuple[int, ...]] = []
    for file in (CONFIG_FILE, WEIGHTS_FILE, PICKLE_FILE, GOLDEN_FILE):
        try:
            seen = (path / file).stat()
            stamps.append((seen.st_dev, seen.st_ino, seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns))
        except OSError as cause:
            stamps.append((cause.errno or 0,))
    return tuple(stamps)


def dtype_of_16_bits(tensors: Mapping[str, TensorInfo], pair: PartTensors) -> str | None:
    """The dtype that both of the pair's tensors have, if it is one of 16 bits."""
    a, b = tensors[pair.a_name].dtype, tensors[pair.b_name].dtype
    return a if a == b and DTYPES[a] == 2 else None


def pair_numel(tensors: Mapping[str, TensorInfo], pair: PartTensors, *, keeps_16_bit: bool) -> tuple[int, int]:
    """Elements of a pool that each of two matrices takes; two of 16 bits take one element, if they are kept."""
    share = 2 if keeps_16_bit and dtype_of_16_bits(tensors, pair) else 1
    a, b = (aligned(-(-math.prod(shape) // share)) for shape in (pair.a_shape, pair.b_shape))
    return a, b


def affine_numel(module: ModulePlan, element_bytes: int) -> int:
    """Elements of a pool that a module's gains and shifts take."""
    return aligned(module.module.out_features * AFFINE_BYTES // element_bytes) if module.vectors else 0


def aligned(numel: int) -> int:
    return -(-numel // ALIGNMENT) * ALIGNMENT


def read_config(path: Path, roots: Sequence[Path] = ()) -> dict[str, Any]:
    """The config as it stands in its file, unread. Raises MalformedError."""
    return parse_object(CONFIG_FILE, _read_config(path, roots), max_values=MAX_CONFIG_VALUES)


def _read_config(path: Path, roots: Sequence[Path]) -> bytes:
    try:
        return read_text(path, CONFIG_FILE, roots, max_bytes=MAX_CONFIG_BYTES)
    except MissingFileError as cause:
        raise MissingFileError(f"{cause}{name_instead(path, CONFIG_FILE)}") from cause


def _read_header(path: Path, roots: Sequence[Path]) -> tuple[bytes, int]:
    """The raw header, and how many bytes the file has."""
    try:
        opened = open_regular(path, WEIGHTS_FILE, roots)
    except MissingFileError as cause:
        if (path / PICKLE_FILE).exists():
            problem = f"{PICKLE_FILE} is a pickle, which can run code, and is not read"
            raise MalformedError(f"{problem}{save_as_safetensors(path)}") from cause
        raise
    with opened:
        return read_header(opened), os.fstat(opened.fileno()).st_size


@remembered
def _naming(tensors: Mapping[str, TensorInfo], modules: tuple[ModuleShape, ...]) -> Naming:
    names = {module.name for module in modules}
    return naming_for(tensors, names) if names else spelling(tensors)


def _examples(tensors: Mapping[str, TensorInfo], modules: Sequence[ModuleShape]) -> str:
    """Names of both sides, if both have some, behind a sentence that they do not meet."""
    matrices = (name for name in tensors if (taken := take_apart(name)) and taken.matrix in _FIRST_MATRICES)
    theirs, ours = _listed(matrices) or _listed(tensors), _listed(module.name for module in modules)
    return f": its tensors are called {theirs}, the model's layers {ours}" if theirs and ours else ""


def _listed(names: Iterable[str]) -> str:
    return " and ".join(clipped(name, MAX_EXAMPLE_CHARS) for name in islice(names, MAX_EXAMPLES))


def _plan(spec: AdapterSpec, modules: tuple[ModuleShape, ...], naming: Naming) -> Plan:
    """The config speaks of modules by their paths in the model that the adapter was trained in."""
    budget = MatchingBudget()
    planned = []
    for module in modules:
        path = naming.path(module.name)
        targeted = spec.targets.matches(path, budget)
        parts = tuple(_part_tensors(spec, module, path, naming, budget)) if targeted else ()
        vectors = tuple(_vector_tensors(spec, module, path, naming, targeted=targeted))
        if parts or vectors:
            weight = naming.tensor(path, BASE_WEIGHT) if parts else ""
            planned.append(ModulePlan(module=module, parts=parts, vectors=vectors, base_weight=weight))
    return tuple(planned)


_plan_once = lru_cache(maxsize=64)(_plan)  # thousands of adapters come from a few training recipes


def _part_tensors(
    spec: AdapterSpec, module: ModuleShape, path: str, naming: Naming, budget: MatchingBudget
) -> Iterator[PartTensors]:
    for index, part in enumerate(spec.parts(path, budget)):
        if spec.dialect is not Dialect.LORA and index == 0:
            names = ("gralora_A", "gralora_B")
            a_shape: tuple[int, ...] = (part.k, module.in_features // part.k, part.r)
            b_shape: tuple[int, ...] = (part.k, part.r, module.out_features // part.k)
        else:
            plain = spec.dialect is Dialect.LORA
            names = (
                ("lora_A.weight", "lora_B.weight")
                if plain
                else ("gralora_A_general.weight", "gralora_B_general.weight")
            )
            a_shape, b_shape = (part.r, module.in_features), (module.out_features, part.r)
        a_name, b_name = (naming.tensor(path, matrix) for matrix in names)
        yield PartTensors(part=part, a_name=a_name, a_shape=a_shape, b_name=b_name, b_shape=b_shape)


def _vector_tensors(
    spec: AdapterSpec, module: ModuleShape, path: str, naming: Naming, *, targeted: bool
) -> Iterator[VectorTensor]:
    wanted = {
        Vector.MAGNITUDES: (targeted and spec.use_dora, "lora_magnitude_vector"),
        Vector.B_BIASES: (targeted and spec.lora_bias, "lora_B.bias"),
        Vector.BIASES: (
            module.has_bias and (spec.biases is Biases.ALL or (targeted and spec.biases is Biases.TARGETED)),
            BIASES[0] if targeted else BIASES[1],
        ),
    }
    for kind, (is_there, matrix) in wanted.items():
        if is_there:
            yield VectorTensor(kind=kind, name=naming.tensor(path, matrix), shape=(module.out_features,))


def _tensor_bytes(tensors: Mapping[str, TensorInfo]) -> int:
    return sum(tensor.numel * DTYPES.get(tensor.dtype, 0) for tensor in tensors.values())


def _packed_numel(plan: Plan, tensors: Mapping[str, TensorInfo], *, keeps_16_bit: bool, element_bytes: int) -> int:
    """Elements of a pool that an adapter takes which follows this plan."""
    pairs = (pair for module in plan for pair in module.parts)
    of_pairs = sum(sum(pair_numel(tensors, pair, keeps_16_bit=keeps_16_bit)) for pair in pairs)
    return of_pairs + sum(affine_numel(module, element_bytes) for module in plan)


@remembered
def _summary(
    tensors: Mapping[str, TensorInfo], plan: Plan, spec: AdapterSpec, keeps_16_bit: bool, element_bytes: int
) -> AdapterSummary:
    parts = [module.parts[0].part for module in plan if module.parts]
    return AdapterSummary(
        dialect=spec.dialect,
        rank=max((part.r for part in parts), default=spec.rank),
        blocks=spec.blocks,
        hybrid_rank=spec.hybrid_rank,
        equivalent_rank=max((module.width for module in plan), default=0),
        scale=max((part.scale for part in parts), key=abs, default=spec.scale),
        num_modules=len(plan),
        tensor_bytes=_tensor_bytes(tensors),
        packed_numel=_packed_numel(plan, tensors, keeps_16_bit=keeps_16_bit, element_bytes=element_bytes),
        base_model=spec.base_model,
        notes=spec.notes,
        invocation=spec.invocation,
    )


@remembered
def _fits(tensors: Mapping[str, TensorInfo], plan: Plan) -> bool:
    """Whether nothing is wrong. What is wrong is a text for one adapter's owner, and not kept."""
    return _matches(plan, tensors) and next(_problems(plan, tensors, (), Naming()), None) is None


def _matches(plan: Plan, tensors: Mapping[str, TensorInfo]) -> bool:
    return any(pair.a_name in tensors for module in plan for pair in module.parts)


def _problems(
    plan: Plan, tensors: Mapping[str, TensorInfo], modules: Iterable[ModuleShape], naming: Naming
) -> Iterator[str]:
    """`modules`: of the base model. They and `naming` make a difference to what is said, and none to whether something
    is.
    """
    yield from _dtype_problems(tensors)
    yield from _misfits(plan, tensors)
    yield from _surplus(plan, tensors, modules, naming)


def _dtype_problems(tensors: Mapping[str, TensorInfo]) -> Iterator[str]:
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            yield f"tensor {name}: dtype {tensor.dtype} is not supported ({', '.join(DTYPES)} are)"


def _misfits(plan: Plan, tensors: Mapping[str, TensorInfo]) -> Iterator[str]:
    for module in plan:
        shape = module.module
        for pair in module.parts:
            k = pair.part.k
            if shape.in_features % k or shape.out_features % k:
                yield f"module {shape.name} [{shape.in_features}, {shape.out_features}] is not divisible by k={k}"
                continue
            yield from _misfit(tensors, pair.a_name, pair.a_shape)
            yield from _misfit(tensors, pair.b_name, pair.b_shape)
        for vector in module.vectors:
            yield from _misfit(tensors, vector.name, vector.shape)
        if module.base_weight in tensors:
            yield from _misfit(tensors, module.base_weight, (shape.out_features, shape.in_features))


def _misfit(tensors: Mapping[str, TensorInfo], name: str, expected: tuple[int, ...]) -> Iterator[str]:
    tensor = tensors.get(name)
    if tensor is None:
        yield f"tensor {name} is missing"
    elif tensor.shape != expected:
        yield f"tensor {name} has shape {list(tensor.shape)}, the base model needs {list(expected)}"


def _surplus(
    plan: Plan, tensors: Mapping[str, TensorInfo], modules: Iterable[ModuleShape], naming: Naming
) -> Iterator[str]:
    expected = {name for module in plan for pair in module.parts for name in (pair.a_name, pair.b_name)}
    expected |= {vector.name for module in plan for vector in module.vectors}
    expected |= {module.base_weight for module in plan}
    known = {module.name for module in modules}
    targeted = {module.module.name for module in plan if module.parts}
    for name in tensors:
        if name in expected:
            continue
        taken = take_apart(name)
        module = naming.module(taken) if taken else None
        if taken is None:
            reasons = (told for part, told in _NOT_SERVED.items() if part in name)
            yield f"tensor {name} {next(reasons, 'is not part of a LoRA or GraLoRA')}"
        elif module is None or (module in known and naming.tensor(naming.path(module), taken.matrix) != name):
            yield f"tensor {name} is spelled in another way than the others"
        elif module not in known:
            yield f"tensor {name}: the base model has no linear layer {module}"
        elif module not in targeted:
            yield f"tensor {name}: target_modules does not name {module}"
        else:
            yield f"tensor {name} is surplus: the config asks for no such tensor"
