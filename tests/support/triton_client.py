"""NVIDIA's client in a process of its own, as its stubs and ours define the same messages: prints what it got as JSON.

python triton_client.py ADDRESS BASE_MODEL ADAPTER
"""

from __future__ import annotations

import asyncio
import json
import queue
import sys
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
from tritonclient import grpc as blocking
from tritonclient.grpc import aio
from tritonclient.utils import InferenceServerException

SAMPLING = {"temperature": "0", "max_tokens": "5"}  # texts, as in NVIDIA's samples
WAIT_S = 30.0


def main(address: str, base: str, adapter: str) -> None:
    with blocking.InferenceServerClient(address) as client:
        got = {
            "live": client.is_server_live(),
            "ready": client.is_server_ready(),
            "models_ready": [client.is_model_ready(name) for name in (base, adapter, "nobody")],
            "server": client.get_server_metadata(as_json=True),
            "metadata": client.get_model_metadata(adapter, as_json=True),
            "config": client.get_model_config(adapter, as_json=True)["config"],
            "index": client.get_model_repository_index(as_json=True)["models"],
            "infer": text_of(client.infer(adapter, inputs(), request_id="7")),
            "lora_name": text_of(client.infer(base, inputs(lora_name=adapter))),
            "parameters": text_of(client.infer(adapter, inputs()[:1], parameters=SAMPLING)),
            "unknown": error_of(client),
            "streamed": streamed(client, adapter),
        }
        client.unload_model(adapter)
        got["unloaded"] = client.is_model_ready(adapter)
        client.load_model(adapter)
        got["loaded"] = client.is_model_ready(adapter)
    got["aio"] = asyncio.run(by_aio(address, base, adapter))
    print(json.dumps(got))


def inputs(*, stream: bool = False, **sampling: str) -> list[Any]:
    """As Triton's vLLM backend takes them."""
    text = blocking.InferInput("text_input", [1], "BYTES")
    text.set_data_from_numpy(np.array([b"hello"], dtype=np.object_))
    parameters = blocking.InferInput("sampling_parameters", [1], "BYTES")
    parameters.set_data_from_numpy(np.array([json.dumps(SAMPLING | sampling).encode()], dtype=np.object_))
    in_pieces = blocking.InferInput("stream", [1], "BOOL")
    in_pieces.set_data_from_numpy(np.array([stream], dtype=bool))
    return [text, parameters, in_pieces]


def text_of(result: Any) -> str:
    return "".join(part.decode() for part in result.as_numpy("text_output"))


def error_of(client: Any) -> list[str]:
    try:
        client.infer("nobody", inputs())
    except InferenceServerException as error:
        return [error.status(), error.message()]
    return []


def streamed(client: Any, adapter: str) -> list[dict[str, object]]:
    """All answers to one request, to the empty last one."""
    arrived: queue.Queue[tuple[Any, Any]] = queue.Queue()
    client.start_stream(lambda result, error: arrived.put((result, error)))
    client.async_stream_infer(adapter, inputs(stream=True), request_id="9", enable_empty_final_response=True)
    answers: list[dict[str, object]] = []
    while not (answers and answers[-1]["final"]):
        result, error = arrived.get(timeout=WAIT_S)
        if error is not None:
            raise error
        answers.append(shown(result))
    client.stop_stream()
    return answers


def shown(result: Any) -> dict[str, object]:
    response = result.get_response()
    final = response.parameters["triton_final_response"].bool_param
    return {"id": response.id, "text": text_of(result) if response.outputs else None, "final": final}


async def by_aio(address: str, base: str, adapter: str) -> dict[str, object]:
    """Requests for several models on one stream, one of which there is not."""

    async def requests() -> AsyncIterator[dict[str, object]]:
        for number, model in enumerate((base, adapter, "nobody")):
            yield {"model_name": model, "inputs": inputs(stream=True), "request_id": str(number)}

    async with aio.InferenceServerClient(address) as client:
        texts: dict[str, str] = {}
        errors = []
        async for result, error in client.stream_infer(requests(), stream_timeout=WAIT_S):
            if error is not None:
                errors.append(error.message())
                continue
            answer = shown(result)
            texts[str(answer["id"])] = texts.get(str(answer["id"]), "") + str(answer["text"])
        whole = await client.infer(adapter, inputs())
        left = client.stream_infer(one_long(adapter), stream_timeout=WAIT_S)
        first, _ = await anext(aiter(left))
        left.cancel()
        return {"texts": texts, "errors": errors, "infer": text_of(whole), "left": shown(first)["final"]}


async def one_long(adapter: str) -> AsyncIterator[dict[str, object]]:
    given = inputs(stream=True, max_tokens="400", ignore_eos="true")
    yield {"model_name": adapter, "inputs": given, "request_id": "left"}


if __name__ == "__main__":
    main(*sys.argv[1:])
