"""Wire messages to the client's records, and the assembly of a stream into a generation. Does no I/O."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import fields
from datetime import UTC, datetime
from typing import Any, TypeVar

from gralora.v1 import adapters_pb2, generation_pb2, server_pb2
from gralora_runtime.adapters.catalogue.store import AdapterState
from gralora_runtime.adapters.info import UnloadResult
from gralora_runtime.info import EngineLoad, TokenizeResult
from gralora_runtime.observation.activity import Activity, RequestActivity
from gralora_runtime.observation.histogram import HistogramCounts
from gralora_runtime.observation.holdups import Hold
from gralora_runtime.observation.timeline import Stage
from gralora_runtime.observation.usage import Tally
from gralora_runtime.request import Delta, Finished, FinishReason, ServedAdapter, Started, TokenLogprob
from gralora_runtime.stream import merge_deltas
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

Record = TypeVar("Record")
AnyGenerateResponse = generation_pb2.GenerateResponse | generation_pb2.StreamGenerateResponse

_FINISH_REASONS = {
    generation_pb2.FINISH_REASON_STOP: FinishReason.STOP,
    generation_pb2.FINISH_REASON_LENGTH: FinishReason.LENGTH,
    generation_pb2.FINISH_REASON_CANCELLED: FinishReason.CANCELLED,
    generation_pb2.FINISH_REASON_DEADLINE: FinishReason.DEADLINE,
}
_STATES = {
    adapters_pb2.ADAPTER_STATE_REGISTERED: AdapterState.REGISTERED,
    adapters_pb2.ADAPTER_STATE_LOADING: AdapterState.LOADING,
    adapters_pb2.ADAPTER_STATE_HOST: AdapterState.HOST,
    adapters_pb2.ADAPTER_STATE_RESIDENT: AdapterState.RESIDENT,
    adapters_pb2.ADAPTER_STATE_FAILED: AdapterState.FAILED,
}


WIRE_STATES = {state: value for value, state in _STATES.items()}


class Assembler:
    """One generation as it arrives: turns messages into deltas and, after the last one, has the whole."""

    def __init__(self) -> None:
        self._start_s = time.perf_counter()
        self._end_s = self._start_s
        self._first_token_s: float | None = None
        self._deltas: list[StreamDelta] = []
        self.request_id = ""

    def add(self, message: AnyGenerateResponse) -> StreamDelta:
        self._end_s = time.perf_counter()
        self.request_id = self.request_id or message.request_id
        if message.token_ids and self._first_token_s is None:
            self._first_token_s = self._end_s
        added = delta(message)
        self._deltas.append(added)
        return added

    def whole(self, *, streamed: bool = True) -> Generation | None:
        """None until the last message has come."""
        if not self._deltas or self._deltas[-1].finished is None:
            return None
        joined = merge_deltas(self._deltas)
        ttft_s = None if self._first_token_s is None else self._first_token_s - self._start_s
        return _generation(
            self.request_id, joined, ttft_s=ttft_s if streamed else None, total_s=self._end_s - self._start_s
        )


def delta(message: AnyGenerateResponse) -> StreamDelta:
    return StreamDelta(
        text=message.text,
        token_ids=tuple(message.token_ids),
        logprobs=tuple(_logprob(logprob) for logprob in message.logprobs),
        started=_started(message.started) if message.HasField("started") else None,
        finished=_finished(message.finished) if message.HasField("finished") else None,
    )


def adapter(message: adapters_pb2.Adapter) -> Adapter:
    versions = tuple(_version(version) for version in message.versions)
    return _record(
        Adapter,
        message,
        state=_STATES[message.state],
        last_used=_last_used(message),
        versions=versions,
        warnings=tuple(message.warnings),
    )


def adapter_page(message: adapters_pb2.ListAdaptersResponse) -> tuple[tuple[Adapter, ...], str]:
    """A page, and the token of the next one."""
    return tuple(adapter(one) for one in message.adapters), message.next_page_token


def adapter_news(message: adapters_pb2.WatchAdaptersResponse) -> AdapterNews:
    return AdapterNews(
        adapters=tuple(adapter(one) for one in message.adapters),
        removed=tuple(message.removed),
        synced=message.synced,
    )


def _version(message: adapters_pb2.AdapterVersion) -> AdapterVersion:
    return _record(
        AdapterVersion,
        message,
        state=_STATES[message.state],
        created=message.created.ToDatetime(UTC),
        last_used=_last_used(message),
        warnings=tuple(message.warnings),
    )


def _last_used(message: adapters_pb2.Adapter | adapters_pb2.AdapterVersion) -> datetime | None:
    return message.last_used.ToDatetime(UTC) if message.HasField("last_used") else None


def described_adapter(
    message: adapters_pb2.GetAdapterResponse
    | adapters_pb2.LoadAdapterResponse
    | adapters_pb2.UploadAdapterResponse
    | adapters_pb2.PinAdapterResponse
    | adapters_pb2.PromoteAdapterResponse
    | adapters_pb2.RollbackAdapterResponse
    | adapters_pb2.SetAdapterCanaryResponse,
) -> Adapter:
    return adapter(message.adapter)


def received(message: adapters_pb2.GetAdapterUploadResponse) -> dict[str, int]:
    """How many bytes of each file the server has."""
    return {file.name: file.size for file in message.files}


def unloaded(message: adapters_pb2.UnloadAdapterResponse) -> UnloadResult:
    return _record(UnloadResult, message)


def server_info(message: server_pb2.GetServerInfoResponse) -> ServerInfo:
    return _record(ServerInfo, message)


def engine_load(message: server_pb2.GetLoadResponse) -> EngineLoad:
    return _record(EngineLoad, message)


def activity(message: server_pb2.GetActivityResponse) -> ServerActivity:
    return ServerActivity(
        activity=_record(
            Activity,
            message,
            load=engine_load(message.load),
            phases={name: _histogram(counts) for name, counts in message.phases.items()},
            first_token=_histogram(message.first_token),
            inter_token=_histogram(message.inter_token),
            adapters={one.account: _record(Tally, one) for one in message.adapters},
        ),
        requests=tuple(
            _record(RequestActivity, one, stage=Stage(one.stage), hold=Hold(one.hold) if one.hold else None)
            for one in message.requests
        ),
    )


def _histogram(message: server_pb2.Histogram) -> HistogramCounts:
    return HistogramCounts(tuple(message.bounds), tuple(message.counts), message.sum)


def usage_page(message: server_pb2.GetUsageResponse) -> tuple[tuple[TenantUsage, ...], str]:
    """A page, and the token of the next one."""
    return tuple(_record(TenantUsage, one) for one in message.usage), message.next_page_token


def explanation(message: server_pb2.ExplainRequestResponse) -> Explanation | None:
    """None: nobody knows the request."""
    if not message.HasField("explanation"):
        return None
    told = message.explanation
    return _record(
        Explanation,
        told,
        received=told.received.ToDatetime(UTC),
        first_token_s=told.first_token_s if told.HasField("first_token_s") else None,
        parts=tuple(_part(part) for part in told.parts),
    )


def _part(message: server_pb2.TimelinePart) -> ExplanationPart:
    longest = message.longest_pause if message.HasField("longest_pause") else None
    return _record(
        ExplanationPart,
        message,
        held_up=tuple(_record(HeldUp, one) for one in message.held_up),
        chunks=tuple(_record(PromptChunk, one) for one in message.chunks),
        longest_pause=_record(LongestPause, longest) if longest is not None else None,
    )


def tokenized(message: server_pb2.TokenizeResponse) -> TokenizeResult:
    return TokenizeResult(tuple(message.token_ids), message.max_model_len)


def _record(kind: type[Record], message: Any, **converted: object) -> Record:
    """Records have their messages' field names, so only what needs converting is named."""
    plain = {field.name: getattr(message, field.name) for field in fields(kind) if field.name not in converted}  # type: ignore[arg-type]
    return kind(**plain, **converted)


def _logprob(message: generation_pb2.TokenLogprob) -> TokenLogprob:
    return TokenLogprob(message.token_id, message.logprob, tuple((one.token_id, one.logprob) for one in message.top))


def _started(message: generation_pb2.Started) -> Started:
    return _record(
        Started,
        message,
        prompt_token_ids=tuple(message.prompt_token_ids),
        adapters=tuple(_record(ServedAdapter, one) for one in message.adapters),
    )


def _finished(message: generation_pb2.Finished) -> Finished:
    matched = message.WhichOneof("matched_stop")
    stop: Mapping[str, Any] = {} if matched is None else {matched: getattr(message, matched)}
    return Finished(
        reason=_FINISH_REASONS[message.reason],
        prompt_tokens=message.usage.prompt_tokens,
        cached_tokens=message.usage.cached_tokens,
        output_tokens=message.usage.output_tokens,
        preemptions=message.preemptions,
        **stop,
    )


def _generation(request_id: str, joined: Delta, *, ttft_s: float | None, total_s: float) -> Generation:
    # A request that was aborted while it waited never started: the proto's defaults stand for what is not known.
    started, finished = joined.started or _started(generation_pb2.Started()), joined.finished
    assert finished is not None
    return Generation(
        request_id=request_id,
        text=joined.text,
        token_ids=joined.token_ids,
        logprobs=joined.logprobs,
        finish_reason=finished.reason,
        stop_string=finished.stop_string,
        stop_token_id=finished.stop_token_id,
        usage=Usage(
            prompt_tokens=finished.prompt_tokens,
            cached_tokens=finished.cached_tokens,
            output_tokens=finished.output_tokens,
        ),
        adapter=started.adapter,
        adapter_digest=started.adapter_digest,
        adapter_version=started.adapter_version,
        adapters=started.adapters,
        seed=started.seed,
        prompt_token_ids=started.prompt_token_ids,
        queue_time_s=started.queue_time_s,
        preemptions=finished.preemptions,
        ttft_s=ttft_s,
        total_s=total_s,
    )
