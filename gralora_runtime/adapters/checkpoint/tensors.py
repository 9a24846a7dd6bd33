"""The header of a safetensors file: which tensors lie where. It says so itself, so every word of it is checked.

Not the safetensors library: it maps the file, and copies every tensor where it only has to tell where they lie.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any, BinaryIO

from gralora_runtime.adapters.checkpoint.file import MalformedError, parse_object, read_at_most, unique_keys

WEIGHTS_FILE = "adapter_model.safetensors"
DTYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
# Limits of a header. 36,864 tensors (of every expert of a model with 48 layers of 128) take 5.5 MB. A letter beyond
# ASCII makes text four times as large in memory.
MAX_HEADER_BYTES = 6 << 20
MAX_HEADER_BYTES_BEYOND_ASCII = 1 << 20
MAX_TENSORS = 40_000
MAX_VALUES = 10 * MAX_TENSORS  # so many commas and brackets, or quotation marks, has the entry of one tensor
MAX_TENSOR_NAME_CHARS = 1024
MAX_DIMENSIONS = 8
MAX_SIZE = 1 << 53
MAX_KEPT_HEADER_BYTES = 256 << 10  # about 2,000 tensors; if larger ones were kept, a few strangers' could fill memory


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a file."""

    dtype: str  # safetensors' name of it
    shape: tuple[int, ...]
    begin: int  # bytes of the file
    end: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def read_header(opened: BinaryIO) -> bytes:
    """The first part of a safetensors file: 8 bytes of length, then so many bytes of JSON."""
    length = read_at_most(opened, WEIGHTS_FILE, 8)
    num_bytes = int.from_bytes(length, "little")
    if len(length) < 8 or num_bytes > MAX_HEADER_BYTES:
        raise MalformedError(f"{WEIGHTS_FILE} is not a safetensors file")
    header = length + read_at_most(opened, WEIGHTS_FILE, num_bytes)
    if len(header) != 8 + num_bytes:
        raise MalformedError(f"{WEIGHTS_FILE} is truncated: it ends inside its header")
    if num_bytes > MAX_HEADER_BYTES_BEYOND_ASCII and not header[8:].isascii():
        raise MalformedError(f"the header of {WEIGHTS_FILE} is too long for one with letters beyond ASCII")
    return header


def parse_header(header: bytes, file_bytes: int) -> Mapping[str, TensorInfo]:
    """The tensors, which lie one behind the other from the header to the end of the file of so many bytes."""
    parse = _parse_tensors_once if len(header) <= MAX_KEPT_HEADER_BYTES else _parse_tensors
    tensors, end = parse(header)
    if file_bytes != end:
        wrong = "truncated" if file_bytes < end else "too long"
        raise MalformedError(f"{WEIGHTS_FILE} is {wrong}: {file_bytes} bytes instead of {end}")
    return tensors


def _parse_tensors(header: bytes) -> tuple[Mapping[str, TensorInfo], int]:
    """The tensors, and the length that the file must have."""

    def entry(pairs: list[tuple[str, Any]]) -> dict[str, Any] | TensorInfo | None:
        """In place of a tensor's dictionary, which would take five times the memory."""
        fields = unique_keys(pairs)
        return _tensor(len(header), fields) if "data_offsets" in fields else fields

    found = parse_object(f"the header of {WEIGHTS_FILE}", header[8:], max_values=MAX_VALUES, make=entry)
    found.pop("__metadata__", None)
    if len(found) > MAX_TENSORS:
        raise MalformedError(f"{WEIGHTS_FILE} has more than {MAX_TENSORS} tensors")
    tensors: dict[str, TensorInfo] = {}
    for key, tensor in found.items():
        if not isinstance(tensor, TensorInfo) or len(key) > MAX_TENSOR_NAME_CHARS:
            raise MalformedError(f"{WEIGHTS_FILE}: the header's entry for {key[:MAX_TENSOR_NAME_CHARS]!r} is malformed")
        tensors[key] = tensor
    return MappingProxyType(tensors), _check_places(tensors, len(header))


def _tensor(header_bytes: int, fields: Mapping[str, Any]) -> TensorInfo | None:
    """None: malformed. JSON's true is no integer, although Python's is."""
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields["data_offsets"]
    if not (isinstance(dtype, str) and isinstance(shape, list) and isinstance(offsets, list)):
        return None
    sizes = (*shape, *offsets)
    if len(shape) > MAX_DIMENSIONS or len(offsets) != 2 or len(dtype) > 16:
        return None
    if not all(type(size) is int and -MAX_SIZE <= size <= MAX_SIZE for size in sizes):
        return None
    return TensorInfo(dtype, tuple(shape), header_bytes + offsets[0], header_bytes + offsets[1])


def _check_places(tensors: Mapping[str, TensorInfo], position: int) -> int:
    """Where the last tensor ends. No gap, no overlap, and each has the bytes that its shape needs."""
    for key, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if tensor.begin != position:
            raise MalformedError(f"{WEIGHTS_FILE} is broken: there is a gap or an overlap before {key!r}")
        num_bytes = tensor.numel * DTYPES.get(tensor.dtype, 0)
        if tensor.dtype in DTYPES and (min(tensor.shape, default=0) < 0 or tensor.end - tensor.begin != num_bytes):
            raise MalformedError(f"{WEIGHTS_FILE} is broken: {key!r} does not have the bytes that its shape needs")
        position = tensor.end
    return position


_parse_tensors_once = lru_cache(maxsize=64)(_parse_tensors)  # one recipe's headers are mostly the same, byte for byte
