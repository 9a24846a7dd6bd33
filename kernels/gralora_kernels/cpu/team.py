"""Atomic counters and waiting, for threads that share out one operation after another. Knows no operation.

Pieces of an operation are claimed one at a time, so a thread that the system has put aside delays its own piece only,
and a thread that never comes delays nothing.
"""

# ruff: noqa: ARG001  # Numba names the arguments of an intrinsic and of its code generator

from __future__ import annotations

import platform
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

LINE = 64  # bytes: counters of their own cache lines do not slow one another down
SPINS = 2_000  # looks at a counter before the core is offered to other threads: about 30 us

_I32 = ir.IntType(32)
_I64 = ir.IntType(64)
_IS_X86 = platform.machine().lower() in ("x86_64", "amd64")


def _counter(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, ir.PointerType(_I64))


@intrinsic
def fetch_add(typing: Any, address: Any) -> Any:
    """Add one to the counter at `address`; what it was before."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", _counter(builder, args[0]), _I64(1), "acq_rel")

    return types.intp(types.intp), codegen


@intrinsic
def read(typing: Any, address: Any) -> Any:
    """The counter at `address`, and with it all that was written before it was raised."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load_atomic(_counter(builder, args[0]), "acquire", 8)

    return types.intp(types.intp), codegen


@intrinsic
def _pause(typing: Any) -> Any:
    """Tell the core that this is a waiting loop."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if _IS_X86:
            function = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(ir.VoidType(), []), "llvm.x86.sse2.pause"
            )
            builder.call(function, [])
        return context.get_dummy_value()

    return types.none(), codegen


@intrinsic
def _yield_core(typing: Any) -> Any:
    """POSIX sched_yield."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(_I32, []), "sched_yield")
        builder.call(function, [])
        return context.get_dummy_value()

    return types.none(), codegen


@njit(nogil=True)
def wait_for(address: int, count: int) -> None:
    """Return once the counter at `address` has reached `count`."""
    spins = 0
    while read(address) < count:
        spins += 1
        if spins < SPINS:
            _pause()
        else:
            _yield_core()
