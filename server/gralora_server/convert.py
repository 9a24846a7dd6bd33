"""Wire messages to the runtime's records and back. Assumes that requests were validated; decides nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict

from gralora.v1 import adapters_pb2, generation_pb2, server_pb2
from gralora_runtime.adapters.catalogue.manifest import Manifest, UploadFile
from gralora_runtime.adapters.catalogue.store import AdapterState
from gralora_runtime.adapters.info import AdapterInfo, UnloadResult, VersionInfo
from gralora_runtime.adapters.watch import AdapterNews
from gralora_runtime.info import EngineInfo, EngineLoad
from gralora_runtime.observation.activity import Activity, RequestActivity
from gralora_runtime.observation.histogram import HistogramCounts
from gralora_runtime.request import (
    ChatMessage,
    Delta,
    Finished,
    FinishReason,
    GenerationRequest,
    Prompt,
    ResponseParams,
    SamplingParams,
    Started,
    StoppingParams,
    StructuredOutput,
    TokenLogprob,
    Tool,
    ToolCall,
    WeightedAdapter,
)
from gralora_server.explanation import clip
from gralora_server.tenants.usage import UsageRow
from gralora_server.validation import AnyGenerateRequest

API_VERSION = "gralora.v1"
MAX_TEXT_BYTES = 4096  # of a text for people; an error may have a line for each of thousands of tensors

_STATES = {
    AdapterState.REGISTERED: adapters_pb2.ADAPTER_STATE_REGISTERED,
    AdapterState.LOADING: adapters_pb2.ADAPTER_STATE_LOADING,
    AdapterState.HOST: adapters_pb2.ADAPTER_STATE_HOST,
    AdapterState.RESIDENT: adapters_pb2.ADAPTER_STATE_RESIDENT,
    AdapterState.FAILED: adapters_pb2.ADAPTER_STATE_FAILED,
}
_REASONS = {
    FinishReason.STOP: generation_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: generation_pb2.FINISH_REASON_LENGTH,
    FinishReason.CANCELLED: generation_pb2.FINISH_REASON_CANCELLED,
    FinishReason.DEADLINE: generation_pb2.FINISH_REASON_DEADLINE,
}


def from_generate_request(
    request: AnyGenerateRequest, *, timeout_s: float | None, trace_id: str = ""
) -> GenerationRequest:
    return GenerationRequest(
        request_id=request.request_id,
        prompt=from_prompt(request),
        adapter=request.adapter,
        adapters=tuple(WeightedAdapter(one.name, weight_of(one)) for one in request.adapters),
        canary_key=request.canary_key,
        priority=request.priority,
        sampling=from_sampling(request.sampling),
        stopping=from_stopping(request.stopping),
        response=from_response(request.response),
        structured_output=from_structured_output(request.structured_output),
        timeout_s=timeout_s,
        trace_id=trace_id,
    )


def weight_of(adapter: generation_pb2.WeightedAdapter) -> float:
    return adapter.weight if adapter.HasField("weight") else 1.0


def from_prompt(request: AnyGenerateRequest | server_pb2.TokenizeRequest) -> Prompt:
    kind = request.WhichOneof("prompt")
    if kind == "text":
        return Prompt(text=request.text)
    if kind == "messages":
        asked = request.messages
        return Prompt(
            messages=tuple(from_turn(turn) for turn in asked.messages),
            tools=tuple(Tool(tool.name, tool.description, tool.parameters) for tool in asked.tools),
            continues=asked.continue_final_message,
        )
    assert not isinstance(request, server_pb2.TokenizeRequest)
    return Prompt(token_ids=tuple(request.token_ids.ids))


def from_turn(turn: generation_pb2.ChatMessage) -> ChatMessage:
    calls = tuple(ToolCall(call.id, call.name, call.arguments) for call in turn.tool_calls)
    return ChatMessage(turn.role, turn.content, calls, turn.tool_call_id, turn.name)


def from_sampling(sampling: generation_pb2.SamplingParams) -> SamplingParams:
    default = SamplingParams()
    return SamplingParams(
        temperature=sampling.temperature if sampling.HasField("temperature") else default.temperature,
        top_p=sampling.top_p if sampling.HasField("top_p") else default.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        repetition_penalty=(
            sampling.repetition_penalty if sampling.HasField("repetition_penalty") else default.repetition_penalty
        ),
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        seed=sampling.seed if sampling.HasField("seed") else None,
        logit_bias=dict(sampling.logit_bias),
    )


def from_stopping(stopping: generation_pb2.StoppingParams) -> StoppingParams:
    return StoppingParams(
        max_tokens=stopping.max_tokens if stopping.HasField("max_tokens") else None,
        min_tokens=stopping.min_tokens,
        stop=tuple(stopping.stop),
        stop_token_ids=tuple(stopping.stop_token_ids),
        ignore_eos=stopping.ignore_eos,
    )


def from_response(response: generation_pb2.ResponseParams) -> ResponseParams:
    return ResponseParams(
        logprobs=response.logprobs,
        top_logprobs=response.top_logprobs,
        echo_prompt_token_ids=response.echo_prompt_token_ids,
    )


def from_structured_output(wanted: generation_pb2.StructuredOutput) -> StructuredOutput | None:
    match wanted.WhichOneof("format"):
        case "json_schema":
            return StructuredOutput(json_schema=wanted.json_schema)
        case "regex":
            return StructuredOutput(regex=wanted.regex)
        case "grammar":
            return StructuredOutput(grammar=wanted.grammar)
        case "choice":
            return StructuredOutput(choice=tuple(wanted.choice.texts))
        case "json_object":
            return StructuredOutput(json_object=True)
        case _:
            return None


def to_min_tokens_per_message(response: generation_pb2.ResponseParams) -> int:
    """Stays in the service: the engine does not know of messages."""
    return response.min_tokens_per_message if response.HasField("min_tokens_per_message") else 1


def to_response(delta: Delta, *, request_id: str) -> generation_pb2.GenerateResponse:
    return generation_pb2.GenerateResponse(
        request_id=request_id,
        text=delta.text,
        token_ids=delta.token_ids,
        logprobs=[to_logprob(logprob) for logprob in delta.logprobs],
        started=None if delta.started is None else to_started(delta.started),
        finished=None if delta.finished is None else to_finished(delta.finished),
    )


def to_stream_response(delta: Delta, *, request_id: str) -> generation_pb2.StreamGenerateResponse:
    return generation_pb2.StreamGenerateResponse(
        request_id=request_id,
        text=delta.text,
        token_ids=delta.token_ids,
        logprobs=[to_logprob(logprob) for logprob in delta.logprobs],
        started=None if delta.started is None else to_started(delta.started),
        finished=None if delta.finished is None else to_finished(delta.finished),
    )


def to_logprob(logprob: TokenLogprob) -> generation_pb2.TokenLogprob:
    return generation_pb2.TokenLogprob(
        token_id=logprob.token_id,
        logprob=logprob.logprob,
        top=[generation_pb2.TopLogprob(token_id=token_id, logprob=value) for token_id, value in logprob.top],
    )


def to_started(started: Started) -> generation_pb2.Started:
    return generation_pb2.Started(**asdict(started))


def to_finished(finished: Finished) -> generation_pb2.Finished:
    message = generation_pb2.Finished(
        reason=_REASONS[finished.reason],
        usage=generation_pb2.Usage(
            prompt_tokens=finished.prompt_tokens,
            cached_tokens=finished.cached_tokens,
            output_tokens=finished.output_tokens,
        ),
        preemptions=finished.preemptions,
    )
    if finished.stop_string is not None:
        message.stop_string = finished.stop_string
    elif finished.stop_token_id is not None:
        message.stop_token_id = finished.stop_token_id
    return message


def to_adapter(info: AdapterInfo) -> adapters_pb2.Adapter:
    message = adapters_pb2.Adapter(
        name=info.name,
        source=clip(info.source, MAX_TEXT_BYTES),
        digest=info.digest,
        state=_STATES[info.state],
        pinned=info.pinned,
        in_flight=info.in_flight,
        pool_bytes=info.pool_bytes,
        error=clip(info.error, MAX_TEXT_BYTES),
        version=info.version,
        previous_version=info.previous,
        follows=info.follows,
        versions=[to_version(version) for version in info.versions],
        warnings=_clipped(info.warnings),
    )
    if info.last_used_s:
        message.last_used.FromNanoseconds(int(info.last_used_s * 1e9))
    if info.canary is not None:
        message.canary_version, message.canary_share = info.canary.number, info.canary.share
    if info.summary is not None:
        message.kind = info.summary.dialect
        message.rank = info.summary.rank
        message.k = info.summary.blocks
        message.hybrid_rank = info.summary.hybrid_rank
        message.equivalent_rank = info.summary.equivalent_rank
        message.scale = info.summary.scale
        message.num_modules = info.summary.num_modules
        message.base_model = info.summary.base_model
    return message


def to_version(info: VersionInfo) -> adapters_pb2.AdapterVersion:
    message = adapters_pb2.AdapterVersion(
        number=info.number,
        digest=info.digest,
        state=_STATES[info.state],
        pinned=info.pinned,
        in_flight=info.in_flight,
        error=clip(info.error, MAX_TEXT_BYTES),
        warnings=_clipped(info.warnings),
    )
    message.created.FromNanoseconds(int(info.created_s * 1e9))
    if info.last_used_s:
        message.last_used.FromNanoseconds(int(info.last_used_s * 1e9))
    return message


def _clipped(sentences: Iterable[str]) -> list[str]:
    return [clip(sentence, MAX_TEXT_BYTES) for sentence in sentences]


def to_news(news: AdapterNews) -> adapters_pb2.WatchAdaptersResponse:
    return adapters_pb2.WatchAdaptersResponse(
        adapters=[to_adapter(info) for info in news.adapters], removed=news.removed, synced=news.synced
    )


def from_states(states: Iterable[adapters_pb2.AdapterState.ValueType]) -> frozenset[AdapterState]:
    wire = {value: state for state, value in _STATES.items()}
    return frozenset(wire[state] for state in states)


def from_upload_header(header: adapters_pb2.AdapterUploadHeader) -> Manifest:
    """Raises InvalidRequestError: only a manifest knows what one may be."""
    files = tuple(UploadFile(name=file.name, size=file.size, sha256=file.sha256) for file in header.files)
    return Manifest(name=header.name, files=files)


def to_received(received: Mapping[str, int]) -> adapters_pb2.GetAdapterUploadResponse:
    return adapters_pb2.GetAdapterUploadResponse(
        files=[adapters_pb2.UploadedAdapterFile(name=name, size=size) for name, size in received.items()]
    )


def to_unloaded(result: UnloadResult) -> adapters_pb2.UnloadAdapterResponse:
    return adapters_pb2.UnloadAdapterResponse(**asdict(result))


def to_server_info(info: EngineInfo) -> server_pb2.GetServerInfoResponse:
    return server_pb2.GetServerInfoResponse(api_version=API_VERSION, **asdict(info))


def to_load(load: EngineLoad) -> server_pb2.GetLoadResponse:
    return server_pb2.GetLoadResponse(**asdict(load))


def to_activity(activity: Activity, requests: Iterable[RequestActivity]) -> server_pb2.GetActivityResponse:
    """Requests as their clients know them."""
    return server_pb2.GetActivityResponse(
        load=to_load(activity.load),
        prefill_tokens=activity.prefill_tokens,
        decode_tokens=activity.decode_tokens,
        phases={name: _to_histogram(counts) for name, counts in activity.phases.items()},
        first_token=_to_histogram(activity.first_token),
        inter_token=_to_histogram(activity.inter_token),
        adapters=[
            server_pb2.AdapterTraffic(account=account, **asdict(tally)) for account, tally in activity.adapters.items()
        ],
        requests=[server_pb2.RequestActivity(**asdict(one)) for one in requests],
    )


def _to_histogram(counts: HistogramCounts) -> server_pb2.Histogram:
    return server_pb2.Histogram(bounds=counts.bounds, counts=counts.counts, sum=counts.sum)


def from_usage_token(token: str) -> tuple[str, str]:
    """The first row of a page: its tenant, which has no slash, and its adapter, which may have one."""
    tenant, _, adapter = token.partition("/")
    return tenant, adapter


def to_usage(rows: Sequence[UsageRow], size: int) -> server_pb2.GetUsageResponse:
    """A page of `size` rows. There may be one more, which begins the next page."""
    usage = [
        server_pb2.TenantUsage(tenant=row.tenant, adapter=row.adapter, **asdict(row.counts)) for row in rows[:size]
    ]
    token = "".join(f"{row.tenant}/{row.adapter}" for row in rows[size:])
    return server_pb2.GetUsageResponse(usage=usage, next_page_token=token)
