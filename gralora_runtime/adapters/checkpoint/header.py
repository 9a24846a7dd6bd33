"""An adapter directory without its weights: config, tensor names, shapes and sizes, held against a base model's layers.

Reads the JSON config and the safetensors header only, in plain Python: no torch, and nothing from the file is executed.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from gralora_runtime.adapters.checkpoint.file import MalformedError, open_regular, parse_object, read_text
from gralora_runtime.adapters.checkpoint.remembered import remembered
from gralora_runtime.adapters.checkpoint.spec import AdapterSpec, Dialect, ModuleShape, Part, parse_config, rejected
from gralora_runtime.adapters.checkpoint.targets import MATCHING_BUDGET_S, MatchingBudget, SlowPatternError
from gralora_runtime.adapters.checkpoint.tensors import DTYPES, WEIGHTS_FILE, TensorInfo, parse_header, read_header

CONFIG_FILE = "adapter_config.json"
GOLDEN_FILE = "golden.json"
PICKLE_FILE = "adapter_model.bin"
MAX_CONFIG_BYTES = 1 << 20
MAX_CONFIG_VALUES = 1 << 17
MAX_KEPT_CONFIG_BYTES = 64 << 10  # a plan is kept together with its config: as for headers, not with a huge one
ALIGNMENT = 16  # elements between the starts of two packed matrices

_TENSOR = re.compile(
    r"base_model\.model\.(?P<module>.+)\."
    r"(?:gralora_[AB](?:_general\.weight)?|lora_[AB]\.weight)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PartTensors:
    """The two tensors of one part on one module: their names in the checkpoint and the shapes they must have."""

    part: Part
    a_name: str
    a_shape: tuple[int, ...]
    b_name: str
    b_shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModulePlan:
    """What an adapter puts on one module of the base model."""

    module: ModuleShape
    parts: tuple[PartTensors, ...]

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
        """The modules for which the checkpoint has tensors of a low-rank pair."""
        found = (_TENSOR.fullmatch(name) for name in self.tensors)
        return tuple(sorted({match["module"] for match in found if match}))

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

    def plan(self, modules: Sequence[ModuleShape]) -> Plan:
        """What the config puts on which of these modules, whether or not the tensors are there."""
        try:
            plan = _plan_once if self.config_bytes <= MAX_KEPT_CONFIG_BYTES else _plan
            return plan(replace(self.spec, base_model=""), tuple(modules))
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
        return DTYPES["F32"] * _packed_numel(self.plan(modules), self.tensors, keeps_16_bit=True)

    def summary(self, modules: Sequence[ModuleShape], *, keeps_16_bit: bool = False) -> AdapterSummary:
        """Only for an adapter that fits these modules. `keeps_16_bit`: see `gralora_kernels.packing`."""
        return _summary(self.tensors, self.plan(modules), self.spec, keeps_16_bit)

    def _problems(self, plan: Plan, modules: Sequence[ModuleShape]) -> list[str]:
        problems = list(_problems(plan, self.tensors, modules))
        if problems and self.spec.base_model:
            problems.insert(0, f"it was trained for the base model {self.spec.base_model!r}")
        if not _matches(plan, self.tensors):
            problems.insert(0, "it matches no module of the base model")
        return problems


def inspect(path: Path, *, name: str = "", roots: Sequence[Path] = ()) -> AdapterHeader:
    """Read an adapter directory's config and header. Files that leave `roots` through a link are refused."""
    name = name or path.name
    try:
        config = read_text(path, CONFIG_FILE, roots, max_bytes=MAX_CONFIG_BYTES)
        spec = parse_config(name, parse_object(CONFIG_FILE, config, max_values=MAX_CONFIG_VALUES))
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


def aligned(numel: int) -> int:
    return -(-numel // ALIGNMENT) * ALIGNMENT


def read_config(path: Path, roots: Sequence[Path] = ()) -> dict[str, Any]:
    """The config as it stands in its file, unread. Raises MalformedError."""
    return parse_object(
        CONFIG_FILE, read_text(path, CONFIG_FILE, roots, max_bytes=MAX_CONFIG_BYTES), max_values=MAX_CONFIG_VALUES
    )


def _read_header(path: Path, roots: Sequence[Path]) -> tuple[bytes, int]:
    """The raw header, and how many bytes the file has."""
    try:
        opened = open_regular(path, WEIGHTS_FILE, roots)
    except MalformedError as cause:
        if (path / PICKLE_FILE).exists():
            problem = f"{PICKLE_FILE} is a pickle, which can run code: save the adapter as safetensors"
            raise MalformedError(problem) from cause
        raise
    with opened:
        return read_header(opened), os.fstat(opened.fileno()).st_size


def _plan(spec: AdapterSpec, modules: tuple[ModuleShape, ...]) -> Plan:
    budget = MatchingBudget()
    return tuple(
        ModulePlan(module=module, parts=tuple(_part_tensors(spec, module, budget)))
        for module in modules
        if spec.targets.matches(module.name, budget)
    )


_plan_once = lru_cache(maxsize=64)(_plan)  # thousands of adapters come from a few training recipes


def _part_tensors(spec: AdapterSpec, module: ModuleShape, budget: MatchingBudget) -> Iterator[PartTensors]:
    prefix = f"base_model.model.{module.name}."
    for index, part in enumerate(spec.parts(module.name, budget)):
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
        yield PartTensors(
            part=part, a_name=prefix + names[0], a_shape=a_shape, b_name=prefix + names[1], b_shape=b_shape
        )


def _tensor_bytes(tensors: Mapping[str, TensorInfo]) -> int:
    return sum(tensor.numel * DTYPES.get(tensor.dtype, 0) for tensor in tensors.values())


def _packed_numel(plan: Plan, tensors: Mapping[str, TensorInfo], *, keeps_16_bit: bool) -> int:
    """Elements of a pool that an adapter takes which follows this plan."""
    pairs = (pair for module in plan for pair in module.parts)
    return sum(sum(pair_numel(tensors, pair, keeps_16_bit=keeps_16_bit)) for pair in pairs)


@remembered
def _summary(tensors: Mapping[str, TensorInfo], plan: Plan, spec: AdapterSpec, keeps_16_bit: bool) -> AdapterSummary:
    parts = [module.parts[0].part for module in plan]
    return AdapterSummary(
        dialect=spec.dialect,
        rank=max((part.r for part in parts), default=spec.rank),
        blocks=spec.blocks,
        hybrid_rank=spec.hybrid_rank,
        equivalent_rank=max((module.width for module in plan), default=0),
        scale=max((part.scale for part in parts), key=abs, default=spec.scale),
        num_modules=len(plan),
        tensor_bytes=_tensor_bytes(tensors),
        packed_numel=_packed_numel(plan, tensors, keeps_16_bit=keeps_16_bit),
        base_model=spec.base_model,
    )


@remembered
def _fits(tensors: Mapping[str, TensorInfo], plan: Plan) -> bool:
    """Whether nothing is wrong. What is wrong is a text for one adapter's owner, and not kept."""
    return _matches(plan, tensors) and next(_problems(plan, tensors, ()), None) is None


def _matches(plan: Plan, tensors: Mapping[str, TensorInfo]) -> bool:
    return any(pair.a_name in tensors for module in plan for pair in module.parts)


def _problems(plan: Plan, tensors: Mapping[str, TensorInfo], modules: Iterable[ModuleShape]) -> Iterator[str]:
    """`modules`: of the base model. They make a difference to what is said, and none to whether something is."""
    yield from _dtype_problems(tensors)
    yield from _misfits(plan, tensors)
    yield from _surplus(plan, tensors, modules)


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


def _misfit(tensors: Mapping[str, TensorInfo], name: str, expected: tuple[int, ...]) -> Iterator[str]:
    tensor = tensors.get(name)
    if tensor is None:
        yield f"tensor {name} is missing"
    elif tensor.shape != expected:
        yield f"tensor {name} has shape {list(tensor.shape)}, the base model needs {list(expected)}"


def _surplus(plan: Plan, tensors: Mapping[str, TensorInfo], modules: Iterable[ModuleShape]) -> Iterator[str]:
    expected = {name for module in plan for pair in module.parts for name in (pair.a_name, pair.b_name)}
    known = {module.name for module in modules}
    targeted = {module.module.name for module in plan}
    for name in tensors:
        if name in expected:
            continue
        match = _TENSOR.fullmatch(name)
        if match is None:
            yield f"tensor {name} is not part of a LoRA or GraLoRA"
        elif match["module"] not in known:
            yield f"tensor {name}: the base model has no linear layer {match['module']}"
        elif match["module"] not in targeted:
            yield f"tensor {name}: target_modules does not name {match['module']}"
        else:
            yield f"tensor {name} is surplus: the config asks for no such tensor"
