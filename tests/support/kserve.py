"""Requests as KServe's clients send them, what an answer says, and a server that speaks their protocol."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager

import grpc
from support.grpc_harness import Client, Served, served

from gralora.foreign import kserve_pb2
from gralora_server.kserve.tensors import BOOL, BYTES, UINT32, string_bytes

Request = kserve_pb2.ModelInferRequest
Response = kserve_pb2.ModelInferResponse


def kserve_served(**settings: object) -> AbstractAsyncContextManager[Served]:
    return served(**{"kserve": True} | settings)  # type: ignore[arg-type]


def infer(
    text: str | None = "hello",
    *,
    model: str = "fake",
    version: str = "",
    id: str = "",  # noqa: A002 -- as they call it
    raw: bool = True,
    outputs: Sequence[str] = (),
    parameters: Mapping[str, bool | int | float | str] | None = None,
    sampling: Mapping[str, object] | None = None,
    **inputs: bool | str,
) -> Request:
    """`inputs`: tensors beside the text and the sampling parameters."""
    request = Request(model_name=model, model_version=version, id=id)
    given = {"text_input": text, "sampling_parameters": None if sampling is None else json.dumps(sampling), **inputs}
    for name, value in given.items():
        if value is not None:
            add_input(request, name, value, raw=raw)
    for name in outputs:
        request.outputs.add(name=name)
    for name, value in (parameters or {}).items():
        set_parameter(request.parameters[name], value)
    return request


def add_input(request: Request, name: str, value: bool | str, *, raw: bool) -> None:
    kind = BOOL if isinstance(value, bool) else BYTES
    tensor = request.inputs.add(name=name, datatype=kind, shape=[1])
    if raw:
        request.raw_input_contents.append(bytes([value]) if isinstance(value, bool) else string_bytes(value))
    elif isinstance(value, bool):
        tensor.contents.bool_contents.append(value)
    else:
        tensor.contents.bytes_contents.append(value.encode())


def set_parameter(parameter: kserve_pb2.InferParameter, value: bool | float | str) -> None:
    """By its type, as tritonclient does."""
    kinds = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}
    setattr(parameter, kinds[type(value)], value)


def said(response: Response) -> dict[str, str | int]:
    """Each output by its name."""
    assert len(response.outputs) == len(response.raw_output_contents)
    found: dict[str, str | int] = {}
    for output, raw in zip(response.outputs, response.raw_output_contents, strict=True):
        assert list(output.shape) == [1]
        if output.datatype == UINT32:
            assert len(raw) == 4
            found[output.name] = int.from_bytes(raw, "little")
        else:
            assert int.from_bytes(raw[:4], "little") == len(raw) - 4
            found[output.name] = raw[4:].decode()
    return found


def is_final(response: Response) -> bool:
    return response.parameters["triton_final_response"].bool_param


class Talk:
    """One call of `ModelStreamInfer`."""

    def __init__(self, client: Client, **call: object) -> None:
        self.call = client.kserve.ModelStreamInfer(**call)

    async def send(self, *requests: Request) -> None:
        for request in requests:
            await self.call.write(request)

    async def read(self) -> kserve_pb2.ModelStreamInferResponse:
        message = await self.call.read()
        assert message is not grpc.aio.EOF
        return message

    async def answers(self) -> list[kserve_pb2.ModelStreamInferResponse]:
        """All that are left, after nothing more is sent."""
        await self.call.done_writing()
        found = []
        while (message := await self.call.read()) is not grpc.aio.EOF:
            found.append(message)
        return found
