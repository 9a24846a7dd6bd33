"""The Python client, synchronous and asyncio. Imports neither torch nor the engine.

with Client("localhost:50051") as client:
    print(client.generate("Tell me about the sea.", adapter="pirate", max_tokens=64).text)
"""

from gralora_runtime.adapters.catalogue.store import AdapterState
from gralora_runtime.adapters.info import UnloadResult
from gralora_runtime.info import EngineLoad, TokenizeResult
from gralora_runtime.request import ChatMessage, Finished, FinishReason, Started, TokenLogprob
from gralora_server.client.aio import AsyncClient, AsyncGenerationStream
from gralora_server.client.connection import ClientTls, Timeouts
from gralora_server.client.errors import (
    AccessDeniedError,
    CallCancelledError,
    DeadlineError,
    FailedPreconditionError,
    FieldViolation,
    GraloraClientError,
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
    ServerError,
    UnavailableError,
)
from gralora_server.client.records import (
    Adapter,
    AdapterNews,
    AdapterVersion,
    Explanation,
    ExplanationPart,
    Generation,
    HeldUp,
    LongestPause,
    PromptChunk,
    ServerActivity,
    ServerInfo,
    StreamDelta,
    TenantUsage,
    Usage,
)
from gralora_server.client.requests import GenerateOptions
from gralora_server.client.sync import Client, GenerationStream

__all__ = [
    "AccessDeniedError",
    "Adapter",
    "AdapterNews",
    "AdapterState",
    "AdapterVersion",
    "AsyncClient",
    "AsyncGenerationStream",
    "CallCancelledError",
    "ChatMessage",
    "Client",
    "ClientTls",
    "DeadlineError",
    "EngineLoad",
    "Explanation",
    "ExplanationPart",
    "FailedPreconditionError",
    "FieldViolation",
    "FinishReason",
    "Finished",
    "GenerateOptions",
    "Generation",
    "GenerationStream",
    "GraloraClientError",
    "HeldUp",
    "InvalidArgumentError",
    "LongestPause",
    "NotFoundError",
    "PromptChunk",
    "ResourceExhaustedError",
    "ServerActivity",
    "ServerError",
    "ServerInfo",
    "Started",
    "StreamDelta",
    "TenantUsage",
    "Timeouts",
    "TokenLogprob",
    "TokenizeResult",
    "UnavailableError",
    "UnloadResult",
    "Usage",
]
