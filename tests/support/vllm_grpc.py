"""Requests as NVIDIA Dynamo sends them by vLLM's protocol, and a server that speaks it."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from pathlib import Path

from support.grpc_harness import Served, served

from gralora.foreign import vllm_pb2

MODEL_DIR = Path("/models/fake")

Request = vllm_pb2.GenerateRequest
Response = vllm_pb2.GenerateResponse


def vllm_served(**settings: object) -> AbstractAsyncContextManager[Served]:
    return served(**{"vllm_grpc": True, "model_dir": MODEL_DIR} | settings)  # type: ignore[arg-type]


def generate(text: str = "hello", **fields: object) -> Request:
    """`fields`: messages as dictionaries."""
    return Request(text=text, **fields)


def as_dynamo(request_id: str = "r1", ids: tuple[int, ...] = (5, 6, 7), **fields: object) -> Request:
    """With all that it always fills."""
    filled = {
        "model": "fake",
        "token_ids": {"ids": ids},
        "temperature": 0.0,
        "sampling": {"num_sequences": 1},
        "decoding": {},
        "stopping": {"max_new_tokens": 8, "stop_token_ids": [2]},
        "response": {"output_text": True, "output_token_ids": True},
        "kv": {},
    }
    return Request(request_id=request_id, **filled | fields)


def tokens_of(messages: list[Response]) -> list[int]:
    return [token for message in messages for token in message.outputs.token_ids]


def text_of(messages: list[Response]) -> str:
    return "".join(message.outputs.text for message in messages)
