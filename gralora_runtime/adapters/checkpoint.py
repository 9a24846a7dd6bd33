"""An adapter directory without its weights: config, tensor names, shapes and sizes, held against a base model's layers.

Reads the JSON config and the safetensors header only, in plain Python: no torch, and nothing from the file is executed.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from gralora_runtime.adapters.names import escapes
from gralora_runtime.adapters.spec import AdapterSpec, Dialect, ModuleShape, Part, parse_config, rejected
from gralora_runtime.adapters.targets import MATCHING_BUDGET_S, MatchingBudget, SlowPatternError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
MAX_CONFIG_BYTES = 1 << 20
MAX_HEADER_BYTES = 16 << 20
MAX_KEPT_HEADER_BYTES = 256 << 10  # about 2,000 tensors; if larger ones were kept, a few strangers' could fill memory
DTYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
ALIGNMENT = 16  # elements between the starts of two packed matrices

_TENSOR = re.compile(
    r"base_model\.model\.(?P<module>.+)\."
    r"(?:gralora_[AB](?:_general\.weight)?|lora_[AB]\.weight)"
)


class _MalformedError(ValueError):
    """A file that cannot be read, whoever's it is."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    dtype: str  # safetensors' name of it
    shape: tuple[int, ...]
    begin: int  # bytes of the file
    end: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


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
        return sum(tensor.numel * DTYPES.get(tensor.dtype, 0) for tensor in self.tensors.values())

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
            return _plan(replace(self.spec, base_model=""), tuple(modules))
        except SlowPatternError as cause:
            problem = f"its patterns take more than {MATCHING_BUDGET_S:.0f} s to match"
            raise rejected(self.name, [problem]) from cause

    def fits(self, modules: Sequence[ModuleShape]) -> list[str]:
        """Everything that keeps this adapter from being served on a base model with these modules."""
        return self._problems(self.plan(modules), modules)

    def fitting_plan(self, modules: Sequence[ModuleShape]) -> Plan:
        """The plan, or AdapterRejectedError with every reason why the checkpoint cannot follow it."""
        plan = self.plan(modules)
        if problems := self._problems(plan, modules):
            raise rejected(self.name, problems)
        return plan

    def dtype_of_16_bits(self, pair: PartTensors) -> str | None:
        """The dtype that both tensors have, if it is one of 16 bits."""
        a, b = self.tensors[pair.a_name].dtype, self.tensors[pair.b_name].dtype
        return a if a == b and DTYPES[a] == 2 else None

    def pair_numel(self, pair: PartTensors, *, keeps_16_bit: bool) -> tuple[int, int]:
        """Elements of a pool that each of two matrices takes; two of 16 bits take one element, if they are kept."""
        share = 2 if keeps_16_bit and self.dtype_of_16_bits(pair) else 1
        a, b = (aligned(-(-math.prod(shape) // share)) for shape in (pair.a_shape, pair.b_shape))
        return a, b

    def packed_numel(self, plan: Plan, *, keeps_16_bit: bool) -> int:
        """Elements of a pool that an adapter takes which follows this plan."""
        return sum(sum(self.pair_numel(pair, keeps_16_bit=keeps_16_bit)) for module in plan for pair in module.parts)

    def cpu_pool_bytes(self, modules: Sequence[ModuleShape]) -> int:
        """What an adapter that fits these modules takes in a pool on the CPU: fp32, but for what comes in 16 bits."""
        return DTYPES["F32"] * self.packed_numel(self.plan(modules), keeps_16_bit=True)

    def summary(self, modules: Sequence[ModuleShape], *, keeps_16_bit: bool = False) -> AdapterSummary:
        """Only for an adapter that fits these modules. `keeps_16_bit`: see `gralora_kernels.packing`."""
        plan = self.plan(modules)
        parts = [module.parts[0].part for module in plan]
        return AdapterSummary(
            dialect=self.spec.dialect,
            rank=max((part.r for part in parts), default=self.spec.rank),
            blocks=self.spec.blocks,
            hybrid_rank=self.spec.hybrid_rank,
            equivalent_rank=max((module.width for module in plan), default=0),
            scale=max((part.scale for part in parts), key=abs, default=self.spec.scale),
            num_modules=len(plan),
            tensor_bytes=self.tensor_bytes,
            packed_numel=self.packed_numel(plan, keeps_16_bit=keeps_16_bit),
            base_model=self.spec.base_model,
        )

    def _problems(self, plan: Plan, modules: Sequence[ModuleShape]) -> list[str]:
        problems = [*self._dtype_problems(), *self._misfits(plan), *self._surplus(plan, modules)]
        if problems and self.spec.base_model:
            problems.insert(0, f"it was trained for the base model {self.spec.base_model!r}")
        if not any(tensors.a_name in self.tensors for module in plan for tensors in module.parts):
            problems.insert(0, "it matches no module of the base model")
        return problems

    def _dtype_problems(self) -> Iterator[str]:
        for name, tensor in self.tensors.items():
            if tensor.dtype not in DTYPES:
                yield f"tensor {name}: dtype {tensor.dtype} is not supported ({', '.join(DTYPES)} are)"

    def _misfits(self, plan: Iterable[ModulePlan]) -> Iterator[str]:
        for module in plan:
            shape = module.module
            for tensors in module.parts:
                k = tensors.part.k
                if shape.in_features % k or shape.out_features % k:
                    yield f"module {shape.name} [{shape.in_features}, {shape.out_features}] is not divisible by k={k}"
                    continue
                yield from self._misfit(tensors.a_name, tensors.a_shape)
                yield from self._misfit(tensors.b_name, tensors.b_shape)

    def _misfit(self, name: str, expected: tuple[int, ...]) -> Iterator[str]:
        tensor = self.tensors.get(name)
        if tensor is None:
            yield f"tensor {name} is missing"
        elif tensor.shape != expected:
            yield f"tensor {name} has shape {list(tensor.shape)}, the base model needs {list(expected)}"

    def _surplus(self, plan: Iterable[ModulePlan], modules: Iterable[ModuleShape]) -> Iterator[str]:
        expected = {name for module in plan for tensors in module.parts for name in (tensors.a_name, tensors.b_name)}
        known = {module.name for module in modules}
        targeted = {module.module.name for module in plan}
        for name in self.tensors:
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


def inspect(path: Path, *, name: str = "", root: Path | None = None) -> AdapterHeader:
    """Read an adapter directory's config and header. Files that leave `root` through a link are refused."""
    name = name or path.name
    config = _read_config(name, _regular_file(name, path, CONFIG_FILE, root))
    spec = parse_config(name, config)
    weights = _regular_file(name, path, WEIGHTS_FILE, root)
    header = read_header_bytes(name, weights)
    return AdapterHeader(
        name=name,
        spec=spec,
        tensors=_parse_header(name, header, weights.stat().st_size),
        fingerprint=hash(header),
    )


def read_header_bytes(name: str, weights: Path) -> bytes:
    """The first part of a safetensors file: 8 bytes of length, then so many bytes of JSON."""
    try:
        with weights.open("rb") as file:
            length = file.read(8)
            num_bytes = int.from_bytes(length, "little")
            if len(length) < 8 or num_bytes > MAX_HEADER_BYTES:
                raise rejected(name, [f"{WEIGHTS_FILE} is not a safetensors file"])
            return length + file.read(num_bytes)
    except OSError as cause:
        raise rejected(name, [f"{WEIGHTS_FILE} cannot be read ({cause.strerror})"]) from cause


def aligned(numel: int) -> int:
    return -(-numel // ALIGNMENT) * ALIGNMENT


def _regular_file(name: str, directory: Path, file: str, root: Path | None) -> Path:
    path = directory / file
    if root is not None and escapes(root, path):
        raise rejected(name, [f"{file} leaves the adapters directory"])
    if path.is_file():  # neither a folder nor a pipe, whose opening would never return
        return path
    if not directory.is_dir():
        raise rejected(name, [f"there is no directory {directory.name}"])
    if file == WEIGHTS_FILE and (directory / PICKLE_FILE).exists():
        raise rejected(name, [f"{PICKLE_FILE} is a pickle, which can run code: save the adapter as safetensors"])
    raise rejected(name, [f"{file} is missing"])


def _read_config(name: str, path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            text = file.read(MAX_CONFIG_BYTES + 1)
    except OSError as cause:
        raise rejected(name, [f"{CONFIG_FILE} cannot be read ({cause.strerror})"]) from cause
    if len(text) > MAX_CONFIG_BYTES:
        raise rejected(name, [f"{CONFIG_FILE} has more than {MAX_CONFIG_BYTES} bytes"])
    try:
        return _parse_object(CONFIG_FILE, text)
    except _MalformedError as cause:
        raise rejected(name, [str(cause)]) from cause


def _parse_object(file: str, text: bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError) as cause:
        raise _MalformedError(f"{file} is not JSON ({cause})") from cause
    if not isinstance(parsed, dict):
        raise _MalformedError(f"{file} is not a JSON object but {type(parsed).__name__}")
    return parsed


def _parse_header(name: str, header: bytes, file_bytes: int) -> Mapping[str, TensorInfo]:
    if len(header) != 8 + int.from_bytes(header[:8], "little"):
        raise rejected(name, [f"{WEIGHTS_FILE} is truncated: it ends inside its header"])
    parse = _parse_tensors_once if len(header) <= MAX_KEPT_HEADER_BYTES else _parse_tensors
    try:
        tensors, end = parse(header)
    except _MalformedError as cause:
        raise rejected(name, [str(cause)]) from cause
    if file_bytes != end:
        wrong = "truncated" if file_bytes < end else "too long"
        raise rejected(name, [f"{WEIGHTS_FILE} is {wrong}: {file_bytes} bytes instead of {end}"])
    return tensors


def _parse_tensors(header: bytes) -> tuple[Mapping[str, TensorInfo], int]:
    """The tensors, which lie one behind the other, and the length that the file must have."""
    tensors: dict[str, TensorInfo] = {}
    for key, entry in _parse_object(f"the header of {WEIGHTS_FILE}", header[8:]).items():
        if key == "__metadata__":
            continue
        try:
            begin, end = (len(header) + int(offset) for offset in entry["data_offsets"])
            tensors[key] = TensorInfo(str(entry["dtype"]), tuple(int(size) for size in entry["shape"]), begin, end)
        except (KeyError, IndexError, TypeError, ValueError, OverflowError) as cause:
            raise _MalformedError(f"{WEIGHTS_FILE}: the header's entry for {key!r} is malformed") from cause
    position = len(header)
    for key, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if tensor.begin != position:
            raise _MalformedError(f"{WEIGHTS_FILE} is broken: there is a gap or an overlap before {key!r}")
        num_bytes = tensor.numel * DTYPES.get(tensor.dtype, 0)
        if tensor.dtype in DTYPES and (min(tensor.shape, default=0) < 0 or tensor.end - tensor.begin != num_bytes):
            raise _MalformedError(f"{WEIGHTS_FILE} is broken: {key!r} does not have the bytes that its shape needs")
        position = tensor.end
    return MappingProxyType(tensors), position


_parse_tensors_once = lru_cache(maxsize=64)(_parse_tensors)  # one recipe's headers are mostly the same, byte for byte


@lru_cache(maxsize=64)  # thousands of adapters come from a few training recipes
def _plan(spec: AdapterSpec, modules: tuple[ModuleShape, ...]) -> Plan:
    budget = MatchingBudget()
    return tuple(
        ModulePlan(module=module, parts=tuple(_part_tensors(spec, module, budget)))
        for module in modules
        if spec.targets.matches(module.name, budget)
    )


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
