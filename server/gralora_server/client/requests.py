"""Python arguments to wire messages, and which RPC each goes to: one list for both clients."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypedDict, TypeVar

import grpc
from grpc_health.v1 import health_pb2_grpc

from gralora.v1 import adapters_pb2, adapters_pb2_grpc, generation_pb2, generation_pb2_grpc, server_pb2, server_pb2_grpc
from gralora_runtime.adapters.catalogue.store import AdapterState
from gralora_runtime.adapters.info import UnloadResult
from gralora_runtime.info import EngineLoad, TokenizeResult
from gralora_runtime.request import ChatMessage
from gralora_server.client import responses
from gralora_server.client.connection import Timeouts
from gralora_server.client.records import Adapter, Explanation, ServerActivity, ServerInfo, TenantUsage

PAGE_SIZE = 500  # adapters, or rows of usage, in one answer

T = TypeVar("T")
Message = ChatMessage | Mapping[str, Any]  # of a message's fields


class GenerateOptions(TypedDict, total=False):
    """Everything about a generation but its prompt. What is left out, or None, has the proto's default."""

    adapter: str  # a name, "name@3" or "name@sha256:..."
    adapters: Mapping[str, float] | Sequence[tuple[str, float]] | None  # instead: the sum of these, by their weights
    request_id: str
    canary_key: str  # requests of one key get the same version while there is a canary
    priority: int  # higher first, among those of the same tenant
    # how the next token is chosen
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    seed: int | None
    logit_bias: Mapping[int, float] | None
    # when it ends
    max_tokens: int | None
    min_tokens: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    ignore_eos: bool
    # what is reported
    logprobs: bool
    top_logprobs: int | None
    echo_prompt_token_ids: bool
    min_tokens_per_message: int | None
    # what it has to match: at most one of these
    json_schema: str | Mapping[str, Any] | None
    regex: str | None
    grammar: str | None  # llguidance's variant of Lark
    choice: Sequence[str] | None
    json_object: bool
    # of this call; default: Timeouts.generate_s
    timeout_s: float | None


_PARTS: dict[str, type[Any]] = {
    "sampling": generation_pb2.SamplingParams,
    "stopping": generation_pb2.StoppingParams,
    "response": generation_pb2.ResponseParams,
}
# option -> the message that has it: the proto is the list
_PART_OF = {field.name: part for part, message in _PARTS.items() for field in message.DESCRIPTOR.fields}
_FORMATS = frozenset(field.name for field in generation_pb2.StructuredOutput.DESCRIPTOR.fields)


def generate_fields(
    prompt: str | None, token_ids: Sequence[int] | None, messages: Sequence[Message] | None, options: GenerateOptions
) -> dict[str, Any]:
    """The fields that GenerateRequest and StreamGenerateRequest share. Raises TypeError for what cannot be sent."""
    fields = prompt_fields(prompt, token_ids, messages)
    parts: dict[str, dict[str, object]] = {part: {} for part in _PARTS}
    formats: dict[str, Any] = {}
    for name, value in options.items():
        if name in ("adapter", "request_id", "canary_key", "priority"):
            fields[name] = value
        elif name == "adapters":
            fields[name] = _weighted(value)
        elif name in _PART_OF:
            if value is not None:
                parts[_PART_OF[name]][name] = [value] if name == "stop" and isinstance(value, str) else value
        elif name in _FORMATS:
            if value is not None and value is not False:
                formats[name] = value
        elif name != "timeout_s":
            raise TypeError(f"generate() has no option {name!r}")
    if formats:
        fields["structured_output"] = _structured_output(**formats)
    return fields | {part: _PARTS[part](**values) for part, values in parts.items()}


def _weighted(adapters: Any) -> list[generation_pb2.WeightedAdapter]:
    pairs = adapters.items() if isinstance(adapters, Mapping) else adapters or ()
    return [generation_pb2.WeightedAdapter(name=name, weight=weight) for name, weight in pairs]


def _structured_output(**formats: Any) -> generation_pb2.StructuredOutput:
    if len(formats) > 1:
        raise TypeError(f"give at most one of {', '.join(sorted(formats))}")
    [(name, value)] = formats.items()
    if name == "json_schema" and not isinstance(value, str):
        value = json.dumps(value)
    elif name == "choice":
        value = generation_pb2.Choices(texts=value)
    return generation_pb2.StructuredOutput(**{name: value})


def prompt_fields(
    prompt: str | None, token_ids: Sequence[int] | None, messages: Sequence[Message] | None
) -> dict[str, Any]:
    if [prompt, token_ids, messages].count(None) != 2:
        raise TypeError("give exactly one of prompt, token_ids and messages")
    if prompt is not None:
        return {"text": prompt}
    if token_ids is not None:
        return {"token_ids": generation_pb2.TokenIds(ids=token_ids)}
    return {"messages": generation_pb2.ChatMessages(messages=[_chat_message(turn) for turn in messages or ()])}


def _chat_message(turn: Message) -> generation_pb2.ChatMessage:
    if isinstance(turn, ChatMessage):
        calls = [generation_pb2.ToolCall(id=one.id, name=one.name, arguments=one.arguments) for one in turn.tool_calls]
        return generation_pb2.ChatMessage(
            role=turn.role, content=turn.content, tool_calls=calls, tool_call_id=turn.tool_call_id, name=turn.name
        )
    return generation_pb2.ChatMessage(**turn)


class Stubs:
    """The generated stubs of one channel, asyncio's when the channel is. Any, because one class serves both."""

    def __init__(self, channel: grpc.Channel | grpc.aio.Channel) -> None:
        anything: Any = channel
        self.generation: Any = generation_pb2_grpc.GenerationServiceStub(anything)
        self.adapters: Any = adapters_pb2_grpc.AdapterServiceStub(anything)
        self.server: Any = server_pb2_grpc.ServerServiceStub(anything)
        self.health: Any = health_pb2_grpc.HealthStub(anything)


@dataclass(frozen=True, slots=True, kw_only=True)
class Call(Generic[T]):
    """A unary call that either client can make: the RPC, its message, and what to make of the answer."""

    rpc: Callable[[Stubs], Any]
    message: Any
    convert: Callable[[Any], T]
    timeout_s: Callable[[Timeouts], float | None] = lambda timeouts: timeouts.other_s


def list_adapters(prefix: str, states: Iterable[AdapterState], token: str) -> Call[tuple[tuple[Adapter, ...], str]]:
    """One page, and the token of the next one."""
    return Call(
        rpc=lambda stubs: stubs.adapters.ListAdapters,
        message=adapters_pb2.ListAdaptersRequest(
            page_size=PAGE_SIZE, page_token=token, prefix=prefix, states=[responses.WIRE_STATES[one] for one in states]
        ),
        convert=responses.adapter_page,
    )


def get_adapter(name: str) -> Call[Adapter]:
    return Call(
        rpc=lambda stubs: stubs.adapters.GetAdapter,
        message=adapters_pb2.GetAdapterRequest(name=name),
        convert=responses.described_adapter,
    )


def load_adapter(name: str, path: str | Path | None, pin: bool) -> Call[Adapter]:
    return Call(
        rpc=lambda stubs: stubs.adapters.LoadAdapter,
        message=adapters_pb2.LoadAdapterRequest(name=name, path=str(path or ""), pin=pin),
        convert=responses.described_adapter,
        timeout_s=lambda timeouts: timeouts.load_adapter_s,
    )


def get_adapter_upload(header: adapters_pb2.AdapterUploadHeader) -> Call[dict[str, int]]:
    return Call(
        rpc=lambda stubs: stubs.adapters.GetAdapterUpload,
        message=adapters_pb2.GetAdapterUploadRequest(header=header),
        convert=responses.received,
    )


def unload_adapter(name: str, delete_upload: bool) -> Call[UnloadResult]:
    return Call(
        rpc=lambda stubs: stubs.adapters.UnloadAdapter,
        message=adapters_pb2.UnloadAdapterRequest(name=name, delete_upload=delete_upload),
        convert=responses.unloaded,
    )


def pin_adapter(name: str, pinned: bool) -> Call[Adapter]:
    return Call(
        rpc=lambda stubs: stubs.adapters.PinAdapter,
        message=adapters_pb2.PinAdapterRequest(name=name, pinned=pinned),
        convert=responses.described_adapter,
    )


def promote_adapter(name: str, version: str) -> Call[Adapter]:
    return Call(
        rpc=lambda stubs: stubs.adapters.PromoteAdapter,
        message=adapters_pb2.PromoteAdapterRequest(name=name, version=version),
        convert=responses.described_adapter,
    )


def rollback_adapter(name: str) -> Call[Adapter]:
    return Call(
        rpc=lambda stubs: stubs.adapters.RollbackAdapter,
        message=adapters_pb2.RollbackAdapterRequest(name=name),
        convert=responses.described_adapter,
    )


def set_adapter_canary(name: str, version: str, share: float) -> Call[Adapter]:
    return Call(
        rpc=lambda stubs: stubs.adapters.SetAdapterCanary,
        message=adapters_pb2.SetAdapterCanaryRequest(name=name, version=version, share=share),
        convert=responses.described_adapter,
    )


def get_info() -> Call[ServerInfo]:
    return Call(
        rpc=lambda stubs: stubs.server.GetServerInfo,
        message=server_pb2.GetServerInfoRequest(),
        convert=responses.server_info,
    )


def get_load() -> Call[EngineLoad]:
    return Call(
        rpc=lambda stubs: stubs.server.GetLoad, message=server_pb2.GetLoadRequest(), convert=responses.engine_load
    )


def get_activity() -> Call[ServerActivity]:
    return Call(
        rpc=lambda stubs: stubs.server.GetActivity,
        message=server_pb2.GetActivityRequest(),
        convert=responses.activity,
    )


def get_usage(tenant: str | None, token: str) -> Call[tuple[tuple[TenantUsage, ...], str]]:
    """One page, and the token of the next one."""
    return Call(
        rpc=lambda stubs: stubs.server.GetUsage,
        message=server_pb2.GetUsageRequest(tenant=tenant, page_size=PAGE_SIZE, page_token=token),
        convert=responses.usage_page,
    )


def tokenize(prompt: str | None, messages: Sequence[Message] | None) -> Call[TokenizeResult]:
    return Call(
        rpc=lambda stubs: stubs.server.Tokenize,
        message=server_pb2.TokenizeRequest(**prompt_fields(prompt, None, messages)),
        convert=responses.tokenized,
    )


def abort(request_id: str) -> Call[bool]:
    return Call(
        rpc=lambda stubs: stubs.server.AbortRequest,
        message=server_pb2.AbortRequestRequest(request_id=request_id),
        convert=lambda answer: bool(answer.aborted),
    )


def explain(request_id: str) -> Call[Explanation | None]:
    return Call(
        rpc=lambda stubs: stubs.server.ExplainRequest,
        message=server_pb2.ExplainRequestRequest(request_id=request_id),
        convert=responses.explanation,
    )


def reload_config() -> Call[tuple[str, ...]]:
    return Call(
        rpc=lambda stubs: stubs.server.ReloadConfig,
        message=server_pb2.ReloadConfigRequest(),
        convert=lambda answer: tuple(answer.changed),
    )
