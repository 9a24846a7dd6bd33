"""What the compiler makes of a Triton kernel, for a GPU that need not be there."""

from __future__ import annotations

import inspect
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gralora_kernels.triton_ops.expand import expand_kernel
from gralora_kernels.triton_ops.launch import (
    SMALL_AND_FULL_TILES,
    VECTOR_BYTES,
    expand_constants,
    launch_options,
    shrink_constants,
)
from gralora_kernels.triton_ops.shrink import shrink_kernel

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
ITEM_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
KERNELS = {"shrink": (shrink_kernel, shrink_constants), "expand": (expand_kernel, expand_constants)}
OPERANDS = {"b_x": "x", "b_a": "weights", "b_b": "weights", "b_v": "u", "b_old": "y"}  # by the name that a load gets
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

GCN_LOAD = re.compile(r"\s(?:global|buffer)_load_(ubyte|ushort|short_d16\w*|dwordx\d|dword)")
GCN_BYTES = {"ubyte": 1, "ushort": 2, "dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Binary:
    """One variant for one target."""

    kernel: str
    target: str
    dtype: str
    tile_tokens: int
    align: int  # elements
    registers: int
    spilled_bytes: int
    shared_bytes: int
    matrix_instructions: tuple[str, ...]
    load_bytes: dict[str, int]  # by operand: the narrowest load


def variants(dtype: str) -> list[tuple[str, dict[str, int]]]:
    """Every (kernel, constants) that the backend may launch for this dtype."""
    aligns = (VECTOR_BYTES // ITEM_BYTES[dtype], 1)
    tiles = SMALL_AND_FULL_TILES
    return [(name, make(tile, align)) for name, (_, make) in KERNELS.items() for tile in tiles for align in aligns]


def compile_variant(kernel: str, constants: dict[str, int], dtype: str, target: str) -> Binary:
    """As the JIT would: pointers are multiples of 16 bytes, and of sizes nothing is known."""
    function = KERNELS[kernel][0]
    compiled = _compile(kernel, constants, dtype, TARGETS[target])
    text = compiled.asm["amdgcn" if target.startswith("gfx") else "ptx"]
    read = _read_gcn if target.startswith("gfx") else _read_cubin
    return Binary(
        kernel=kernel,
        target=target,
        dtype=dtype,
        tile_tokens=constants["BLOCK_M"],
        align=constants["ALIGN"],
        shared_bytes=compiled.metadata.shared,
        load_bytes=_load_bytes(text, _operand_lines(function)),
        **read(compiled),
    )


def _compile(kernel: str, constants: dict[str, int], dtype: str, target: GPUTarget) -> Any:
    function = KERNELS[kernel][0]
    elements = dict.fromkeys(("x", "y", "arena", "u"), f"*{dtype}")
    pointers = {**elements, "index": "*i64", "scale": "*fp32", "order": "*i32", "items": "*i32", "head": "*i32"}
    names = function.arg_names
    return triton.compile(
        ASTSource(
            function,
            {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names},
            constexprs={(names.index(name),): value for name, value in constants.items()},
            attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in pointers},
        ),
        target=target,
        options=launch_options(kernel, target.backend),
    )


def _read_cubin(compiled: Any) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _run(TOOLS / "cuobjdump", "-res-usage", file.name)
        code = _run(TOOLS / "nvdisasm", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", usage)
    assert found, usage
    registers, stack, local = map(int, found.groups())
    instructions = re.findall(r"\b(HMMA|HGMMA|UTC\w*MMA|QGMMA|DMMA)\.?([\w.]*)", code)
    names = sorted({".".join(filter(None, parts)) for parts in instructions})
    return {"registers": registers, "spilled_bytes": stack + local, "matrix_instructions": tuple(names)}


def _read_gcn(compiled: Any) -> dict[str, Any]:
    text = compiled.asm["amdgcn"]

    def number(name: str) -> int:
        return int(re.findall(rf"\.{name}:\s*(\d+)", text)[-1])

    return {
        "registers": number("vgpr_count"),
        "spilled_bytes": 4 * (number("vgpr_spill_count") + number("sgpr_spill_count")),
        "matrix_instructions": tuple(sorted(set(re.findall(r"v_mfma_(\w+)", text)))),
    }


def _operand_lines(function: Any) -> dict[int, str]:
    """Line of the source -> the operand that is loaded there."""
    lines, first = inspect.getsourcelines(function.fn)
    found = {}
    for number, line in enumerate(lines, first):
        if load := re.match(r"\s*(\w+) = tl\.load\(", line):
            found[number] = OPERANDS.get(load[1], "")
    return {number: operand for number, operand in found.items() if operand}


def _load_bytes(text: str, operands: dict[int, str]) -> dict[str, int]:
    """The assembler names the source line of each instruction, which tells whose load it is."""
    found: dict[str, int] = {}
    operand = None
    for line in text.splitlines():
        if location := re.match(r"\s*\.loc\s+\d+\s+(\d+)", line):
            operand = operands.get(int(location[1]))
        elif operand and (size := _load_size(line)):
            found[operand] = min(size, found.get(operand, size))
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
