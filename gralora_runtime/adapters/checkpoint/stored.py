"""Values of a checkpoint's file as numpy holds them, and as another dtype. Knows not what they are for."""

from __future__ import annotations

import os

import numpy as np
import torch

from gralora_kernels.packing import Array
from gralora_runtime.adapters.checkpoint.file import MalformedError
from gralora_runtime.adapters.checkpoint.recipe import TORCH_DTYPES
from gralora_runtime.adapters.checkpoint.tensors import DTYPES, WEIGHTS_FILE
from gralora_runtime.adapters.residency.transfer import serial_pieces

# How numpy holds what safetensors calls so. It has no bfloat16: those stay bits, and so do all 16 bits in a blob.
ARRAYS = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}


def changed() -> MalformedError:
    return MalformedError(f"{WEIGHTS_FILE} changed while it was being read")


def read_range(file: int, start: int, end: int) -> Array:
    """Bytes of the file. Several threads may ask at once: no position is moved. They are read, not mapped: a mapped
    file that somebody truncates would kill the process."""
    data = np.empty(end - start, np.uint8)
    num_read = 0
    while num_read < len(data):
        try:
            num_new = os.preadv(file, [data[num_read:].data], start + num_read)
        except OSError as cause:
            raise MalformedError(f"{WEIGHTS_FILE} cannot be read ({cause.strerror})") from cause
        if num_new == 0:
            raise changed()
        num_read += num_new
    return data


def held(values: Array, stored: str, dtype: torch.dtype) -> Array:
    """Flat values as a blob of `dtype` holds them, 16 bits as bits. What has to be rounded is rounded from float32."""
    if TORCH_DTYPES[stored] != dtype:
        values = np.require(values, requirements="A")  # a tensor may begin at any byte of a file
        source = torch.from_numpy(values.view(np.int16) if DTYPES[stored] == 2 else values).view(TORCH_DTYPES[stored])
        result = torch.empty(len(values), dtype=dtype)
        directly = torch.float32 in {source.dtype, dtype}
        for to, of in zip(serial_pieces(result), serial_pieces(source), strict=True):
            to.copy_(of if directly else of.float())
        values = result.view(torch.int16).numpy() if dtype.itemsize == 2 else result.numpy()
    return values.view(np.uint16) if dtype.itemsize == 2 else values
