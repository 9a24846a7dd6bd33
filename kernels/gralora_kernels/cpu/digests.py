"""SHA-256 of many stretches of memory in one call that keeps no interpreter lock.

`hashlib` lets go of the lock, too, but takes it again behind each stretch, and threads that do so wait for one another.
The function is that of the library below `hashlib`; where it cannot be had, `hashlib` has to do.
"""

# ruff: noqa: ARG001  # Numba names the arguments of an intrinsic and of its code generator

from __future__ import annotations

import ctypes
import hashlib
import sys
from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import njit, types
from numba.extending import intrinsic

from gralora_kernels.packing import SHA256_BYTES, Array, hash_each


def find_sha256() -> int:
    """The address of OpenSSL's `SHA256(data, num_bytes, digest)`; 0 if hashlib was built without it, or around it."""
    library = getattr(sys.modules.get(hashlib.sha256.__module__), "__file__", None)
    if library is None:
        return 0
    try:
        function = ctypes.CDLL(library).SHA256
    except (AttributeError, OSError):
        return 0
    return ctypes.cast(function, ctypes.c_void_p).value or 0


_SHA256 = find_sha256()


def sha256_of_each(data: Array, spans: Array) -> Array:
    """See `HashMany`."""
    if not _SHA256:
        return hash_each(data, spans)
    digests = np.empty((len(spans), SHA256_BYTES), np.uint8)
    _sha256_of_each(_SHA256, data, spans, digests)
    return digests


@intrinsic
def _call(typing: Any, function: Any, data: Any, num_bytes: Any, digest: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = ir.PointerType(ir.IntType(8))
        kind = ir.FunctionType(pointer, [pointer, ir.IntType(64), pointer])
        data, digest = (builder.inttoptr(address, pointer) for address in (args[1], args[3]))
        builder.call(builder.inttoptr(args[0], ir.PointerType(kind)), [data, args[2], digest])
        return context.get_dummy_value()

    return types.none(types.intp, types.intp, types.intp, types.intp), codegen


@njit(nogil=True, cache=True)
def _sha256_of_each(function: int, data: Array, spans: Array, digests: Array) -> None:
    for i in range(len(spans)):
        begin, end = spans[i, 0], spans[i, 1]
        assert 0 <= begin <= end <= len(data)
        _call(function, data.ctypes.data + begin, end - begin, digests.ctypes.data + i * SHA256_BYTES)
