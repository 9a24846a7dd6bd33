"""Explicit SIMD for Numba: a vector of fp32 lanes and the few operations that the kernels use, emitted as LLVM IR.

LLVM may not reorder them, so a sum has one order whatever loop it stands in: that is what makes a token's result
independent of its batch, at full speed. Addresses are plain integers (`Tensor.data_ptr()`) and nothing checks bounds.
"""

# ruff: noqa: ARG001  # Numba names the arguments of an intrinsic and of its code generator

from __future__ import annotations

from typing import Any

import llvmlite.binding as llvm  # type: ignore[import-untyped]
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.extending import intrinsic, register_model

# A wider vector than the machine's is right but spills; a narrower one is slow.
LANES = 16 if llvm.get_host_cpu_features().get("avx512f", False) else 8

_F32 = ir.FloatType()
_I32 = ir.IntType(32)
_VECTOR = ir.VectorType(_F32, LANES)
_MASK = ir.VectorType(ir.IntType(1), LANES)


class VectorType(types.Type):  # type: ignore[misc]
    """LANES fp32 numbers in a register."""

    def __init__(self) -> None:
        super().__init__(name=f"f32x{LANES}")


vector = VectorType()


@register_model(VectorType)
class _VectorModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, fe_type: Any) -> None:
        super().__init__(manager, fe_type, _VECTOR)


def constant(value: float) -> ir.Constant:
    return ir.Constant(_VECTOR, [ir.Constant(_F32, value)] * LANES)


def splat_value(builder: Any, scalar: Any, lane_type: Any = _F32) -> Any:
    one = builder.insert_element(ir.Constant(ir.VectorType(lane_type, LANES), ir.Undefined), scalar, _I32(0))
    return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(_I32, LANES), [0] * LANES))


def call(builder: Any, name: str, result: Any, args: list[Any]) -> Any:
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, [a.type for a in args]), name)
    return builder.call(function, args)


def pointer_to(builder: Any, address: Any, offset: Any) -> Any:
    """`address` in bytes, `offset` in fp32 elements."""
    byte = builder.add(address, builder.shl(offset, ir.Constant(offset.type, 2)))
    return builder.inttoptr(byte, ir.PointerType(_VECTOR))


def ask_for(builder: Any, pointer: Any) -> None:
    """To be read soon: bring it into the second-level cache. Any address is allowed."""
    call(builder, "llvm.prefetch.p0", ir.VoidType(), [pointer, _I32(0), _I32(2), _I32(1)])


def load_widened(builder: Any, address: Any, *, bfloat16: bool) -> Any:
    """LANES elements of 16 bits as fp32, exactly. `address` in bytes."""
    if not bfloat16:
        halves = builder.load(builder.inttoptr(address, ir.PointerType(ir.VectorType(ir.HalfType(), LANES))), align=2)
        return builder.fpext(halves, _VECTOR)
    integers = ir.VectorType(_I32, LANES)  # bfloat16 is the upper half of an fp32
    bits = builder.load(builder.inttoptr(address, ir.PointerType(ir.VectorType(ir.IntType(16), LANES))), align=2)
    return builder.bitcast(builder.shl(builder.zext(bits, integers), ir.Constant(integers, [16] * LANES)), _VECTOR)


def _mask(builder: Any, count: Any) -> Any:
    """Lanes below `count`."""
    lanes = ir.Constant(ir.VectorType(_I32, LANES), list(range(LANES)))
    return builder.icmp_signed("<", lanes, splat_value(builder, builder.trunc(count, _I32), _I32))


def _fold(builder: Any, value: Any, combine: Any) -> Any:
    """One number from all lanes, halving: the order is fixed by this code."""
    width = LANES
    while width > 1:
        width //= 2
        order = [width + i if i < width else i for i in range(LANES)]
        high = builder.shuffle_vector(value, value, ir.Constant(ir.VectorType(_I32, LANES), order))
        value = combine(value, high)
    return builder.extract_element(value, _I32(0))


def _at_16_bit(builder: Any, address: Any, offset: Any) -> Any:
    return builder.add(address, builder.shl(offset, ir.Constant(offset.type, 1)))


_SUFFIX = f"v{LANES}f32"


@intrinsic
def load(typing: Any, address: Any, offset: Any) -> Any:
    """LANES elements from `offset`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(pointer_to(builder, *args), align=4)

    return vector(types.intp, types.intp), codegen


@intrinsic
def load_float16(typing: Any, address: Any, offset: Any) -> Any:
    """LANES elements from `offset`, in elements of 16 bits."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return load_widened(builder, _at_16_bit(builder, *args), bfloat16=False)

    return vector(types.intp, types.intp), codegen


@intrinsic
def load_bfloat16(typing: Any, address: Any, offset: Any) -> Any:
    """LANES elements from `offset`, in elements of 16 bits."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return load_widened(builder, _at_16_bit(builder, *args), bfloat16=True)

    return vector(types.intp, types.intp), codegen


def _bytes(builder: Any, address: Any, offset: Any) -> Any:
    """LANES bytes."""
    kind = ir.PointerType(ir.VectorType(ir.IntType(8), LANES))
    return builder.load(builder.inttoptr(builder.add(address, offset), kind), align=1)


@intrinsic
def load_int8(typing: Any, address: Any, offset: Any) -> Any:
    """LANES signed bytes from `offset`, as fp32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.sitofp(builder.sext(_bytes(builder, *args), ir.VectorType(_I32, LANES)), _VECTOR)

    return vector(types.intp, types.intp), codegen


@intrinsic
def low_nibbles(typing: Any, bits: Any, byte: Any) -> Any:
    """The lower 4 bits of one of each lane's four bytes, as fp32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _masked_byte(builder, args, 0x0F)

    return vector(vector, types.intp), codegen


@intrinsic
def high_nibbles(typing: Any, bits: Any, byte: Any) -> Any:
    """The upper 4 bits of one of each lane's four bytes, where they are: 16 times what they say, as fp32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _masked_byte(builder, args, 0xF0)

    return vector(vector, types.intp), codegen


def _masked_byte(builder: Any, args: Any, mask: int) -> Any:
    bits, byte = args
    integers = ir.VectorType(_I32, LANES)
    distance = builder.trunc(builder.shl(byte, ir.Constant(byte.type, 3)), _I32)
    shifted = builder.lshr(builder.bitcast(bits, integers), splat_value(builder, distance, _I32))
    return builder.sitofp(builder.and_(shifted, ir.Constant(integers, [mask] * LANES)), _VECTOR)


@intrinsic
def forget_loads(typing: Any) -> Any:
    """No instruction, but what is loaded before and after it is loaded twice, and no register keeps it meanwhile."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.fence("acq_rel", "singlethread")
        return context.get_dummy_value()

    return types.none(), codegen


@intrinsic
def load_part(typing: Any, address: Any, offset: Any, count: Any) -> Any:
    """The first `count` lanes from memory, the others zero; touches no memory beyond."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer, mask = pointer_to(builder, *args[:2]), _mask(builder, args[2])
        return call(builder, f"llvm.masked.load.{_SUFFIX}.p0", _VECTOR, [pointer, _I32(4), mask, constant(0.0)])

    return vector(types.intp, types.intp, types.intp), codegen


@intrinsic
def store(typing: Any, address: Any, offset: Any, value: Any) -> Any:
    """LANES elements to `offset`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[2], pointer_to(builder, *args[:2]), align=4)
        return context.get_dummy_value()

    return types.none(types.intp, types.intp, vector), codegen


@intrinsic
def store_part(typing: Any, address: Any, offset: Any, value: Any, count: Any) -> Any:
    """The first `count` lanes to memory; touches no memory beyond."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer, mask = pointer_to(builder, *args[:2]), _mask(builder, args[3])
        call(builder, f"llvm.masked.store.{_SUFFIX}.p0", ir.VoidType(), [args[2], pointer, _I32(4), mask])
        return context.get_dummy_value()

    return types.none(types.intp, types.intp, vector, types.intp), codegen


@intrinsic
def prefetch(typing: Any, address: Any, offset: Any) -> Any:
    """Ask for the cache line of `offset`; any address is allowed."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        ask_for(builder, pointer_to(builder, *args))
        return context.get_dummy_value()

    return types.none(types.intp, types.intp), codegen


@intrinsic
def load_scalar(typing: Any, address: Any, offset: Any) -> Any:
    """One fp32 element."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(builder.bitcast(pointer_to(builder, *args), ir.PointerType(_F32)), align=4)

    return types.float32(types.intp, types.intp), codegen


@intrinsic
def store_scalar(typing: Any, address: Any, offset: Any, value: Any) -> Any:
    """One fp32 element."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[2], builder.bitcast(pointer_to(builder, *args[:2]), ir.PointerType(_F32)), align=4)
        return context.get_dummy_value()

    return types.none(types.intp, types.intp, types.float32), codegen


@intrinsic
def splat(typing: Any, scalar: Any) -> Any:
    """The same number in every lane."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return splat_value(builder, args[0])

    return vector(types.float32), codegen


@intrinsic
def fma(typing: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c, rounded once."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return call(builder, f"llvm.fma.{_SUFFIX}", _VECTOR, list(args))

    return vector(vector, vector, vector), codegen


@intrinsic
def multiply(typing: Any, a: Any, b: Any) -> Any:
    """a * b."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fmul(*args)

    return vector(vector, vector), codegen


@intrinsic
def add(typing: Any, a: Any, b: Any) -> Any:
    """a + b."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fadd(*args)

    return vector(vector, vector), codegen


@intrinsic
def total(typing: Any, value: Any) -> Any:
    """The sum of all lanes, by halves."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _fold(builder, args[0], builder.fadd)

    return types.float32(vector), codegen


@intrinsic
def largest(typing: Any, value: Any) -> Any:
    """The largest of all lanes."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _fold(builder, args[0], lambda a, b: builder.select(builder.fcmp_ordered(">", a, b), a, b))

    return types.float32(vector), codegen


@intrinsic
def exp(typing: Any, value: Any) -> Any:
    """e to each lane, for lanes <= 0 (as in a softmax): within 2 ulp, and 0 below -87."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _exp(builder, args[0])

    return vector(vector), codegen


@intrinsic
def load_int64(typing: Any, address: Any, offset: Any) -> Any:
    """One 8-byte integer; `offset` in such integers."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        byte = builder.add(args[0], builder.shl(args[1], ir.Constant(args[1].type, 3)))
        return builder.load(builder.inttoptr(byte, ir.PointerType(ir.IntType(64))), align=8)

    return types.intp(types.intp, types.intp), codegen


@intrinsic
def load_int32(typing: Any, address: Any, offset: Any) -> Any:
    """One 4-byte integer; `offset` in such integers."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.bitcast(pointer_to(builder, *args), ir.PointerType(_I32))
        return builder.sext(builder.load(pointer, align=4), ir.IntType(64))

    return types.intp(types.intp, types.intp), codegen


@intrinsic
def store_int32(typing: Any, address: Any, offset: Any, value: Any) -> Any:
    """One 4-byte integer; `offset` in such integers."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.bitcast(pointer_to(builder, *args[:2]), ir.PointerType(_I32))
        builder.store(builder.trunc(args[2], _I32), pointer, align=4)
        return context.get_dummy_value()

    return types.none(types.intp, types.intp, types.intp), codegen


@intrinsic
def silu(typing: Any, value: Any) -> Any:
    """x / (1 + e^-x), lane by lane."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fmul(args[0], _sigmoid(builder, args[0]))

    return vector(vector), codegen


@intrinsic
def gelu_tanh(typing: Any, value: Any) -> Any:
    """x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))), which is x * sigmoid(2 * that argument)."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        x = args[0]
        cube = builder.fmul(builder.fmul(x, x), x)
        inner = builder.fadd(x, builder.fmul(constant(0.044715), cube))
        return builder.fmul(x, _sigmoid(builder, builder.fmul(constant(2 * 0.7978845608028654), inner)))

    return vector(vector), codegen


@intrinsic
def tanh(typing: Any, value: Any) -> Any:
    """Hyperbolic tangent, to an absolute error of 2e-7."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        twice = builder.fmul(constant(2.0), _sigmoid(builder, builder.fmul(constant(2.0), args[0])))
        return builder.fsub(twice, constant(1.0))

    return vector(vector), codegen


def _sigmoid(builder: Any, x: Any) -> Any:
    """1 / (1 + e^-x) by an exponential that never overflows: e = e^-|x|, and then 1 / (1 + e) or e / (1 + e)."""
    negative = builder.fcmp_ordered("<", x, constant(0.0))
    e = _exp(builder, builder.select(negative, x, builder.fsub(constant(0.0), x)))
    top = builder.select(negative, e, constant(1.0))
    return builder.fdiv(top, builder.fadd(constant(1.0), e))


@intrinsic
def maximum(typing: Any, a: Any, b: Any) -> Any:
    """The larger of each lane."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.select(builder.fcmp_ordered(">", *args), *args)

    return vector(vector, vector), codegen


# e^f on |f| <= ln2 / 2 by its Taylor series; the last term left out is below 2e-9.
_EXP_TERMS = (1 / 5040, 1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0)


def _exp(builder: Any, value: Any) -> Any:
    """e^x = 2^n * e^f with n = round(x / ln2); ln2 is subtracted in two parts so that f keeps its last bits."""

    def fused(a: Any, b: Any, c: Any) -> Any:
        return call(builder, f"llvm.fma.{_SUFFIX}", _VECTOR, [a, b, c])

    integers = ir.VectorType(_I32, LANES)
    tiny = builder.fcmp_ordered("<", value, constant(-87.0))
    value = builder.select(tiny, constant(-87.0), value)
    scaled = builder.fmul(value, constant(1.4426950408889634))
    n = call(builder, f"llvm.rint.{_SUFFIX}", _VECTOR, [scaled])
    f = fused(n, constant(-0.693359375), value)
    f = fused(n, constant(2.12194440e-4), f)
    series = constant(_EXP_TERMS[0])
    for term in _EXP_TERMS[1:]:
        series = fused(series, f, constant(term))
    exponent = builder.add(builder.fptosi(n, integers), ir.Constant(integers, [127] * LANES))
    power = builder.bitcast(builder.shl(exponent, ir.Constant(integers, [23] * LANES)), _VECTOR)
    return builder.select(tiny, constant(0.0), builder.fmul(series, power))
