"""An adapter directory without its weights: config, tensor names, shapes and sizes, held against a base model's layers.

Reads the JSON config and the safetensors header only, in plain Python: no torch, and nothing from the file is executed.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from gralora_runtime.adapters.checkpoint.config_keys import SAVED
from gralora_runtime.adapters.checkpoint.experts import module_of, unwrapped
from gralora_runtime.adapters.checkpoint.file import (
    MalformedError,
    MissingFileError,
    open_regular,
    parse_object,
    read_text,
)
from gralora_runtime.adapters.checkpoint.mending import name_instead, save_as_safetensors
from gralora_runtime.adapters.checkpoint.naming import Naming, naming_for, spelling, take_apart
from gralora_runtime.adapters.checkpoint.own_tokens import TOKENIZER_FILE
from gralora_runtime.adapters.checkpoint.plan import (
    Copy,
    PartTensors,
    Plan,
    Planned,
    planned,
    room_numel,
)
from gralora_runtime.adapters.checkpoint.remembered import remembered
from gralora_runtime.adapters.checkpoint.spec import (
    PARAMETERS,
    AdapterSpec,
    Dialect,
    ModuleShape,
    clipped,
    parse_config,
    rejected,
)
from gralora_runtime.adapters.checkpoint.targets import MATCHING_BUDGET_S, SlowPatternError, endings
from gralora_runtime.adapters.checkpoint.tensors import DTYPES, WEIGHTS_FILE, TensorInfo, parse_header, read_header
from gralora_runtime.adapters.checkpoint.vocabulary import vocabulary_of

CONFIG_FILE = "adapter_config.json"
GOLDEN_FILE = "golden.json"
PICKLE_FILE = "adapter_model.bin"
MAX_CONFIG_BYTES = 1 << 20
MAX_CONFIG_VALUES = 1 << 17
MAX_KEPT_CONFIG_BYTES = 64 << 10  # a plan is kept together with its config: as for headers, not with a huge one
MAX_EXAMPLES = 2  # names of each side, where no name of one is the other's
MAX_EXAMPLE_CHARS = 200
_NOT_SAVED = (
    ": its trained weights are not in the file. PEFT does not load it without them either; if none were trained, write "
    "null in its place"
)
_FIRST_MATRICES = ("gralora_A", "lora_A.weight")


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
    replaces: tuple[str, ...] = ()  # modules of which weights stand in the place of the base model's
    added_tokens: int = 0  # that it has behind those of the base model


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
        return tuple(sorted({unwrapped(module) for module in found if module is not None}))

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
        return self._planned(modules).modules

    def _planned(self, modules: Sequence[ModuleShape]) -> Planned:
        try:
            plan = _planned_once if self.config_bytes <= MAX_KEPT_CONFIG_BYTES else planned
            naming = self.naming(modules)
            vocabulary = _vocabulary(self.tensors, tuple(modules), naming)
            return plan(replace(self.spec, base_model="", notes=()), tuple(modules), naming, vocabulary)
        except SlowPatternError as cause:
            problem = f"its patterns take more than {MATCHING_BUDGET_S:.0f} s to match"
            raise rejected(self.name, [problem]) from cause

    def fits(self, modules: Sequence[ModuleShape]) -> list[str]:
        """Everything that keeps this adapter from being served on a base model with these modules."""
        return self._problems(self._planned(modules), modules)

    def copies(self, modules: Sequence[ModuleShape]) -> list[Copy]:
        """Tensors of this checkpoint that have to be what the base model has."""
        return [copy for copy in self._planned(modules).copies if copy.name in self.tensors]

    def fitting_plan(self, modules: Sequence[ModuleShape]) -> Plan:
        """The plan, or AdapterRejectedError with every reason why the checkpoint cannot follow it."""
        plan = self._planned(modules)
        if not _fits(self.tensors, plan):
            raise rejected(self.name, self._problems(plan, modules))
        return plan.modules

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

    def _problems(self, plan: Planned, modules: Sequence[ModuleShape]) -> list[str]:
        problems = list(_problems(plan, self.tensors, modules, self.naming(modules)))
        if problems:
            problems[:0] = self._unmatched_parameters(modules)
        if problems and self.spec.base_model:
            problems.insert(0, f"it was trained for the base model {self.spec.base_model!r}")
        if not _matches(plan.modules, self.tensors):
            problems.insert(0, f"it matches no module of the base model{_examples(self.tensors, modules)}")
        return problems

    def _unmatched_parameters(self, modules: Sequence[ModuleShape]) -> list[str]:
        """PEFT passes over those that match nothing, so they are a problem only where there is one."""
        naming = self.naming(modules)
        stacked = [module.name for module in modules if module.kind in PARAMETERS]
        has = f"such are {_listed(stacked)}" if stacked else "it has none"
        known = {ending for name in stacked for ending in endings(naming.path(name))}
        return [
            f"target_parameters: {name!r} names no parameter of the base model that can be adapted ({has})"
            for name in sorted(self.spec.targets.parameters - known)
        ]


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
    for file in (CONFIG_FILE, WEIGHTS_FILE, PICKLE_FILE, GOLDEN_FILE, TOKENIZER_FILE):
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
    a, b = (pair.experts * room_numel(pair.part.r * features, share) for features in pair.features)
    return a, b


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


_vocabulary = remembered(vocabulary_of)


@remembered
def _naming(tensors: Mapping[str, TensorInfo], modules: tuple[ModuleShape, ...]) -> Naming:
    names = {module_of(module.name) if module.kind in PARAMETERS else module.name for module in modules}
    return naming_for(tensors, names) if names else spelling(tensors)


def _examples(tensors: Mapping[str, TensorInfo], modules: Sequence[ModuleShape]) -> str:
    """Names of both sides, if both have some, behind a sentence that they do not meet."""
    matrices = (name for name in tensors if (taken := take_apart(name)) and taken.matrix in _FIRST_MATRICES)
    theirs, ours = _listed(matrices) or _listed(tensors), _listed(module.name for module in modules)
    return f": its tensors are called {theirs}, the model's layers {ours}" if theirs and ours else ""


def _listed(names: Iterable[str]) -> str:
    return " and ".join(clipped(name, MAX_EXAMPLE_CHARS) for name in islice(names, MAX_EXAMPLES))


_planned_once = lru_cache(maxsize=64)(planned)  # thousands of adapters come from a few training recipes


def _tensor_bytes(tensors: Mapping[str, TensorInfo]) -> int:
    return sum(tensor.numel * DTYPES.get(tensor.dtype, 0) for tensor in tensors.values())


def _packed_numel(plan: Plan, tensors: Mapping[str, TensorInfo], *, keeps_16_bit: bool, element_bytes: int) -> int:
    """Elements of a pool that an adapter takes which follows this plan."""
    pairs = (pair for module in plan for pair in module.parts)
    of_pairs = sum(sum(pair_numel(tensors, pair, keeps_16_bit=keeps_16_bit)) for pair in pairs)
    return of_pairs + sum(module.extra_numel(element_bytes) + sum(module.rows_pair_numel()) for module in plan)


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
        replaces=tuple(module.module.name for module in plan if module.replaces),
        added_tokens=max((module.added_tokens for module in plan), default=0),
    )


@remembered
def _fits(tensors: Mapping[str, TensorInfo], plan: Planned) -> bool:
    """Whether nothing is wrong. What is wrong is a text for one adapter's owner, and not kept."""
    return _matches(plan.modules, tensors) and next(_problems(plan, tensors, (), Naming()), None) is None


def _matches(plan: Plan, tensors: Mapping[str, TensorInfo]) -> bool:
    return any(pair.a_name in tensors for module in plan for pair in module.parts)


def _problems(
    plan: Planned, tensors: Mapping[str, TensorInfo], modules: Iterable[ModuleShape], naming: Naming
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


def _misfits(plan: Planned, tensors: Mapping[str, TensorInfo]) -> Iterator[str]:
    for module in plan.modules:
        shape = module.module
        if module.unserved:
            yield f"module {shape.name}: {module.unserved}"
            continue
        if any(shape.in_features % pair.part.k or shape.out_features % pair.part.k for pair in module.parts):
            k = module.parts[0].part.k
            yield f"module {shape.name} [{shape.in_features}, {shape.out_features}] is not divisible by k={k}"
            continue
        if module.is_whole and not any(name in tensors for name, _ in module.tensors):
            yield f"{SAVED}: {shape.name} is missing{_NOT_SAVED}"
            continue
        for name, expected in module.tensors:
            yield from _misfit(tensors, name, expected)
    for copy in plan.copies:
        if copy.name in tensors:
            yield from _misfit(tensors, copy.name, copy.shape)


def _misfit(tensors: Mapping[str, TensorInfo], name: str, expected: tuple[int, ...]) -> Iterator[str]:
    tensor = tensors.get(name)
    if tensor is None:
        yield f"tensor {name} is missing"
    elif tensor.shape != expected:
        yield f"tensor {name} has shape {list(tensor.shape)}, the base model needs {list(expected)}"


def _surplus(
    plan: Planned, tensors: Mapping[str, TensorInfo], modules: Iterable[ModuleShape], naming: Naming
) -> Iterator[str]:
    expected = {name for module in plan.modules for name, _ in module.tensors}
    expected |= {copy.name for copy in plan.copies}
    known = {module.name for module in modules}
    mixtures = {module_of(module.name) for module in modules if module.kind in PARAMETERS}
    targeted = {module.module.name for module in plan.modules if module.parts}
    for name in tensors:
        if name in expected:
            continue
        taken = take_apart(name)
        module = naming.module(taken) if taken else None
        if taken is None:
            yield f"tensor {name} is not part of a LoRA or GraLoRA"
        elif module is None or (module in known and naming.tensor(naming.path(module), taken.matrix) != name):
            yield f"tensor {name} is spelled in another way than the others"
        elif unwrapped(module) in mixtures:
            yield f"tensor {name} is for a parameter of {unwrapped(module)} that target_parameters does not name"
        elif module not in known:
            yield f"tensor {name}: the base model has no layer {module} for it"
        elif module not in targeted:
            yield f"tensor {name}: target_modules does not name {module}"
        else:
            yield f"tensor {name} is surplus: the config asks for no such tensor"
