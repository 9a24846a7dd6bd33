"""Changes of a message by its descriptor: fields cleared, repeated and set to what nobody expects."""

from __future__ import annotations

import math
import random
import struct
from collections.abc import Iterator, Sequence
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

HUGE_SHARE = 0.002  # of texts: more would measure how fast loopback is
HUGE_BYTES = 5 << 20  # more than a prompt may have, less than a message
MANY = (2, 17, 1025, 5000)  # one more than most lists may have
MAX_COPIED_BYTES = 1 << 20
MAX_DEPTH = 6

_SIGNED_32 = (0, 1, 2, -1, 63, 64, 319, 320, 1 << 20, (1 << 31) - 1, -(1 << 31))
_SIGNED_64 = (*_SIGNED_32, 1 << 53, (1 << 63) - 1, -(1 << 63))
_REAL = (0.0, -0.0, 1.0, -1.0, 0.5, 2.0, 1e-45, 1e308, -1e308, 5e-324, math.nan, math.inf, -math.inf)
_NUMBERS: dict[int, tuple[Any, ...]] = {
    FieldDescriptor.CPPTYPE_INT32: _SIGNED_32,
    FieldDescriptor.CPPTYPE_INT64: _SIGNED_64,
    FieldDescriptor.CPPTYPE_UINT32: (0, 1, (1 << 32) - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 1, 1 << 53, (1 << 64) - 1),
    FieldDescriptor.CPPTYPE_DOUBLE: _REAL,
    FieldDescriptor.CPPTYPE_FLOAT: tuple(struct.unpack("f", struct.pack("f", x))[0] for x in _REAL if abs(x) != 1e308),
    FieldDescriptor.CPPTYPE_BOOL: (False, True),
    FieldDescriptor.CPPTYPE_ENUM: (0, 1, 2, 99, -1, (1 << 31) - 1),
}
_TEXTS = (
    "", " ", "w3 w4", "a", "\0", "a\0b", "%s%n", "{0}", "é", "\ufffe", "\U0010ffff", "\u202e", "../..", "/etc/passwd",
    "a/../b", "b0@1", "b0@0", "b0@99999999999999999999", "b0@sha256:", "b0@sha256:0123456789ab", "@", "a/b/c", "*",
    "(others)", "w3 " * 80, "x" * 129, "x" * 300, "x" * 5000, "\n" * 1000, "'; DROP TABLE names; --", "1", "-1", "nan",
)  # fmt: skip


def change(rng: random.Random, message: Message) -> None:
    """One change, anywhere in it. May leave it as it is, where it has no field."""
    places = list(_places(message))
    if not places:
        return
    inside, field = rng.choice(places)
    if rng.random() < 0.15:
        inside.ClearField(field.name)
    elif field.is_repeated:
        _fill(rng, inside, field)
    elif field.message_type is not None:
        getattr(inside, field.name).SetInParent()
    else:
        setattr(inside, field.name, _value(rng, field))


def fields_of(message: Message) -> Sequence[FieldDescriptor]:
    """Its stubs name two kinds of descriptors, which are one."""
    descriptor: Any = message.DESCRIPTOR
    fields: Sequence[FieldDescriptor] = descriptor.fields
    return fields


def _places(message: Message, depth: int = 0) -> Iterator[tuple[Message, FieldDescriptor]]:
    """Each field of it, set or not, and of the messages that it has."""
    for field in fields_of(message):
        yield message, field
        if field.message_type is None or depth == MAX_DEPTH or _is_map(field):
            continue
        if not field.is_repeated and message.HasField(field.name):
            yield from _places(getattr(message, field.name), depth + 1)
        elif field.is_repeated:
            for one in getattr(message, field.name)[:3]:
                yield from _places(one, depth + 1)


def _fill(rng: random.Random, message: Message, field: FieldDescriptor) -> None:
    there, count = getattr(message, field.name), rng.choice((1, 1, 1, *MANY))
    if _is_map(field):
        assert field.message_type is not None
        key, value = field.message_type.fields_by_name["key"], field.message_type.fields_by_name["value"]
        names = [_value(rng, key)] if count == 1 else [_numbered(key, number) for number in range(count)]
        if value.message_type is None:
            for name in names:
                there[name] = _value(rng, value)
            return
        change(rng, there[names[0]])
        for name in names[1 : _at_most(count, there[names[0]].ByteSize())]:
            there[name].CopyFrom(there[names[0]])
    elif field.message_type is not None:
        copied = [type(one).FromString(one.SerializeToString()) for one in there[:1]]
        for _ in range(_at_most(count, sum(one.ByteSize() for one in copied))):
            there.add().CopyFrom(copied[0]) if copied else there.add()
    else:
        value = _value(rng, field)
        there.extend([value] * _at_most(count, len(value) if isinstance(value, str | bytes) else 0))


def _numbered(key: FieldDescriptor, number: int) -> int | str:
    return str(number) if key.cpp_type == FieldDescriptor.CPPTYPE_STRING else number


def _at_most(count: int, num_bytes: int) -> int:
    """Copies of so many bytes, or else a text that is huge would be so thousands of times, in our own memory."""
    return min(count, 1 + MAX_COPIED_BYTES // max(num_bytes, 1))


def _is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and field.message_type.GetOptions().map_entry


def _value(rng: random.Random, field: FieldDescriptor) -> Any:
    if field.cpp_type in _NUMBERS:
        return rng.choice(_NUMBERS[field.cpp_type])
    is_huge = rng.random() < HUGE_SHARE
    text = "w3 " * (HUGE_BYTES // 3) if is_huge else rng.choice(_TEXTS)
    return text.encode() if field.type == FieldDescriptor.TYPE_BYTES else text
