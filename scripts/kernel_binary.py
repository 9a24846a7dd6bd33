"""What the compiler makes of a Triton kernel, for a GPU that need not be there."""

from __future__ import annotations

import inspect
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gralora_kernels.triton_ops import (
    activation,
    attention_launch,
    embedding,
    norm,
    product,
    rotary,
    sampling_launch,
    tokens,
)
from gralora_kernels.triton_ops.adapters.launch import variants as adapter_variants
from gralora_kernels.triton_ops.variant import ELEMENT_NAMES, Variant

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = tuple(ELEMENT_NAMES)
# Each lists its variants of a dtype.
KERNELS = (
    adapter_variants,
    norm.variants,
    rotary.variants,
    attention_launch.variants,
    activation.variants,
    tokens.variants,
    embedding.variants,
    product.variants,
    sampling_launch.variants,
)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

GCN_LOAD = re.compile(r"\s(?:global|buffer)_load_(ubyte|ushort|short_d16\w*|dwordx\d|dword)")
GCN_BYTES = {"ubyte": 1, "ushort": 2, "dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Binary:
    """One variant for one target."""

    variant: str
    family: str
    target: str
    dtype: str
    is_product: bool
    wide_loads: tuple[str, ...]
    registers: int
    spilled_bytes: int
    shared_bytes: int
    matrix_instructions: tuple[str, ...]
    load_bytes: dict[str, int]  # by the name that a load is assigned to: the narrowest


def variants(dtype: torch.dtype) -> list[Variant]:
    """Every form of every kernel that may be launched for this dtype."""
    return [variant for listed in KERNELS for variant in listed(dtype)]


def compile_numbered(dtype: torch.dtype, number: int, target: str) -> Binary:
    """`variants(dtype)[number]`: what another process can be asked for."""
    return compile_variant(variants(dtype)[number], target)


def compile_variant(variant: Variant, target: str) -> Binary:
    """As the JIT would: pointers are multiples of 16 bytes, and of sizes nothing is known."""
    compiled = compile_for(variant, TARGETS[target])
    text = compiled.asm["amdgcn" if target.startswith("gfx") else "ptx"]
    read = _read_gcn if target.startswith("gfx") else _read_cubin
    return Binary(
        variant=variant.name,
        family=variant.family,
        target=target,
        dtype=ELEMENT_NAMES[variant.dtype],
        is_product=variant.is_product,
        wide_loads=variant.wide_loads,
        shared_bytes=compiled.metadata.shared,
        load_bytes=_load_bytes(text, _named_loads(variant.function)),
        **read(compiled),
    )


def compile_for(variant: Variant, target: GPUTarget) -> Any:
    names = variant.function.arg_names
    kinds = dict.fromkeys(variant.constants, "constexpr") | dict.fromkeys(variant.floats, "fp32") | variant.pointers
    return triton.compile(
        ASTSource(
            variant.function,
            {name: kinds.get(name, "i32") for name in names},
            constexprs={(names.index(name),): value for name, value in variant.constants.items()},
            attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in variant.pointers},
        ),
        target=target,
        options=dict(variant.options.get(target.backend, {})),
    )


def _read_cubin(compiled: Any) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _run(TOOLS / "cuobjdump", "-res-usage", file.name)
        code = _disassembled(file.name) if "mma" in compiled.asm["ptx"] else ""
    found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", usage)
    assert found, usage
    registers, stack, local = map(int, found.groups())
    instructions = re.findall(r"\b(HMMA|HGMMA|UTC\w*MMA|QGMMA|DMMA)\.?([\w.]*)", code)
    names = sorted({".".join(filter(None, parts)) for parts in instructions})
    return {"registers": registers, "spilled_bytes": stack + local, "matrix_instructions": tuple(names)}


def _disassembled(cubin: str) -> str:
    """Slow, and without a `mma` in PTX there is nothing to find: ptxas makes matrix instructions of nothing else."""
    return _run(TOOLS / "nvdisasm", "--print-code", "--no-dataflow", cubin)


def _read_gcn(compiled: Any) -> dict[str, Any]:
    text = compiled.asm["amdgcn"]

    def number(name: str) -> int:
        return int(re.findall(rf"\.{name}:\s*(\d+)", text)[-1])

    return {
        "registers": number("vgpr_count"),
        # Scalar registers that do not fit are kept in lanes of a vector register: that is no memory.
        "spilled_bytes": number("private_segment_fixed_size"),
        "matrix_instructions": tuple(sorted(set(re.findall(r"v_mfma_(\w+)", text)))),
    }


def _named_loads(function: Any) -> dict[int, str]:
    """Line of the source file -> the name that is loaded there."""
    lines, _ = inspect.findsource(function.fn)
    found = ((number, re.match(r"\s*(b_\w+) = tl\.load\(", line)) for number, line in enumerate(lines, 1))
    return {number: load[1] for number, load in found if load}


def _load_bytes(text: str, names: dict[int, str]) -> dict[str, int]:
    """The assembler names the source line of each instruction, which tells whose load it is."""
    found: dict[str, int] = {}
    name = None
    for line in text.splitlines():
        if location := re.match(r"\s*\.loc\s+\d+\s+(\d+)", line):
            name = names.get(int(location[1]))
        elif name and (size := _load_size(line)):
            found[name] = min(size, found.get(name, size))
    return found


def _load_size(line: str) -> int | None:
    if load := GCN_LOAD.search(line):
        return GCN_BYTES.get(load[1], 2)
    if load := re.search(r"cp\.async\.c[ag]\.shared\.global.*?\], *(0x[0-9a-f]+|\d+)", line):
        return int(load[1], 0)
    if load := re.search(r"ld\.global(?:\.\w+)*?(?:\.v(\d))?\.[busf](\d+)", line):
        return int(load[1] or 1) * int(load[2]) // 8
    return None


def _run(tool: Path, *arguments: str) -> str:
    return subprocess.run([str(tool), *arguments], capture_output=True, text=True, check=True).stdout
