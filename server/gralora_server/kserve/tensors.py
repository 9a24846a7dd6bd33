"""Which tensors a model takes and gives, and how their elements are read and written. Knows not what they mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from gralora.foreign import kserve_pb2
from gralora_runtime.errors import InvalidRequestError

BYTES, BOOL, UINT32 = "BYTES", "BOOL", "UINT32"
LENGTH_BYTES = 4  # before a string
MAX_SHOWN_DIMS = 8

Value = bool | str
InputTensor = kserve_pb2.ModelInferRequest.InferInputTensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """Of one element. `is_optional`: of an input, whether requests may lack it."""

    name: str
    datatype: str
    is_optional: bool = True


INPUTS = (
    Tensor(name="text_input", datatype=BYTES, is_optional=False),
    Tensor(name="sampling_parameters", datatype=BYTES),
    Tensor(name="stream", datatype=BOOL),
    Tensor(name="exclude_input_in_output", datatype=BOOL),
    Tensor(name="return_finish_reason", datatype=BOOL),
    Tensor(name="return_num_input_tokens", datatype=BOOL),
    Tensor(name="return_num_output_tokens", datatype=BOOL),
)
OUTPUTS = (
    Tensor(name="text_output", datatype=BYTES),
    Tensor(name="finish_reason", datatype=BYTES),
    Tensor(name="num_input_tokens", datatype=UINT32),
    Tensor(name="num_output_tokens", datatype=UINT32),
)

_INPUTS: Mapping[str, Tensor] = MappingProxyType({one.name: one for one in INPUTS})
_OUTPUTS: Mapping[str, Tensor] = MappingProxyType({one.name: one for one in OUTPUTS})


def is_output(name: str) -> bool:
    return name in _OUTPUTS


def read_inputs(request: kserve_pb2.ModelInferRequest) -> dict[str, Value]:
    """The element of each input by its name, raw or not. Raises InvalidRequestError."""
    raws = request.raw_input_contents
    if raws and len(raws) != len(request.inputs):
        problem = f"must have an entry for each input, and there are {len(request.inputs)}"
        raise InvalidRequestError("raw_input_contents", f"{len(raws)} entries", problem)
    found: dict[str, Value] = {}
    for index, tensor in enumerate(request.inputs):
        if tensor.name not in _INPUTS:
            raise InvalidRequestError("inputs", tensor.name, "is an input that this server does not know")
        if tensor.name in found:
            raise InvalidRequestError("inputs", tensor.name, "is there twice")
        _check_form(tensor)
        found[tensor.name] = _raw_element(tensor, raws[index]) if raws else _element(tensor)
    return found


def add_output(response: kserve_pb2.ModelInferResponse, name: str, value: str | int) -> None:
    """Raw, as one of their clients cannot read typed texts with every numpy."""
    raw = string_bytes(value) if isinstance(value, str) else value.to_bytes(4, "little")
    response.outputs.add(name=name, datatype=_OUTPUTS[name].datatype, shape=[1])
    response.raw_output_contents.append(raw)


def string_bytes(text: str) -> bytes:
    """A string's raw form."""
    raw = text.encode()
    return len(raw).to_bytes(LENGTH_BYTES, "little") + raw


def _check_form(tensor: InputTensor) -> None:
    expected = _INPUTS[tensor.name].datatype
    if tensor.datatype != expected:
        raise InvalidRequestError(tensor.name, tensor.datatype, f"must be of the datatype {expected}")
    if any(size != 1 for size in tensor.shape):
        raise InvalidRequestError(tensor.name, list(tensor.shape[:MAX_SHOWN_DIMS]), "must have one element: shape [1]")


def _raw_element(tensor: InputTensor, raw: bytes) -> Value:
    if tensor.datatype == BOOL:
        if len(raw) != 1:
            raise InvalidRequestError(tensor.name, f"{len(raw)} bytes", "must be one byte")
        return raw != b"\0"
    if len(raw) < LENGTH_BYTES or int.from_bytes(raw[:LENGTH_BYTES], "little") != len(raw) - LENGTH_BYTES:
        problem = f"must be one string: its length in {LENGTH_BYTES} bytes, and so many bytes"
        raise InvalidRequestError(tensor.name, f"{len(raw)} bytes", problem)
    return _text(tensor.name, raw[LENGTH_BYTES:])


def _element(tensor: InputTensor) -> Value:
    contents = tensor.contents.bool_contents if tensor.datatype == BOOL else tensor.contents.bytes_contents
    if len(contents) != 1:
        raise InvalidRequestError(
            tensor.name, f"{len(contents)} elements", "must have one element, raw or in its contents"
        )
    element = contents[0]
    return _text(tensor.name, element) if isinstance(element, bytes) else element


def _text(name: str, raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as cause:
        raise InvalidRequestError(name, raw[:20], "must be UTF-8") from cause
