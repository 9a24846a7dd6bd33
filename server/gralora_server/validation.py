"""Is a request well formed? Pure functions over wire messages; each raises InvalidRequestError with the field's path.

Checked before anything is converted, so that an absurd request costs nothing. Knows nothing of the model: what depends
on its vocabulary or context window is the engine's to check.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Sequence

from gralora.v1 import adapters_pb2, generation_pb2, server_pb2
from gralora_runtime.adapters.catalogue.names import check_name, parse_reference
from gralora_runtime.errors import InvalidRequestError

AnyGenerateRequest = generation_pb2.GenerateRequest | generation_pb2.StreamGenerateRequest

MAX_TEXT_BYTES = 4 << 20
MAX_PROMPT_TOKEN_IDS = 1 << 20
MAX_MESSAGES = 4096
MAX_TOOLS = 128
MAX_ROLE_CHARS = 64
MAX_NAME_CHARS = 256
MAX_REFERENCE_CHARS = 512  # an organisation, a name, a revision and a digest
MAX_VERSION_CHARS = 80
MAX_PAGE_SIZE = 1000
MAX_STATES = 16
MAX_PATH_CHARS = 4096
MAX_UPLOAD_FILES = 16  # which of them are known is the manifest's to say
MAX_CHUNK_BYTES = 1 << 20
MAX_REQUEST_ID_CHARS = 128
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 1000
MAX_STOP_TOKEN_IDS = 1024
MAX_LOGIT_BIAS = 1024
MAX_TOP_LOGPROBS = 20
MAX_TOKENS_PER_MESSAGE = 1024
MAX_GRAMMAR_BYTES = 64 << 10  # of a schema and of a choice's texts, too
MAX_REGEX_BYTES = 8 << 10
MAX_CHOICES = 512
# Sampling computes in float32, where more is infinite and less can be 0; either makes NaN of scores that are, too.
MAX_FLOAT32 = (2 - 2.0**-23) * 2.0**127
MIN_FLOAT32 = 1.2e-38  # what is written, and a little above the smallest normal number
MAX_REPETITION_PENALTY = 10.0
MAX_PENALTY = 2.0
MAX_BIAS = 100.0
MAX_PRIORITY = 100
MAX_MIXED_ADAPTERS = 4  # each brings its ranks, and all of them are computed
MAX_ADAPTER_WEIGHT = 100.0
REQUEST_ID = re.compile(r"[!-~]*")


def validate_generate(request: AnyGenerateRequest) -> None:
    validate_request_id(request.request_id)
    _validate_length("adapter", request.adapter, MAX_REFERENCE_CHARS)
    _validate_adapters(request)
    _validate_length("canary_key", request.canary_key, MAX_NAME_CHARS)
    _validate_range("priority", request.priority, -MAX_PRIORITY, MAX_PRIORITY)
    _validate_prompt(request)
    validate_sampling(request.sampling)
    validate_stopping(request.stopping)
    validate_response(request.response)
    if request.HasField("structured_output"):
        validate_structured_output(request.structured_output)


def validate_tokenize(request: server_pb2.TokenizeRequest) -> None:
    match request.WhichOneof("prompt"):
        case "text":
            _validate_text(request.text)
        case "messages":
            _validate_messages(request.messages)
        case _:
            raise InvalidRequestError("prompt", None, "set text or messages")


def validate_name(name: str) -> None:
    """Which characters a name may have is the catalogue's to say: one that breaks its rules is an unknown one."""
    if not name:
        raise InvalidRequestError("name", name, "must not be empty")
    _validate_length("name", name, MAX_REFERENCE_CHARS)


def validate_list(request: adapters_pb2.ListAdaptersRequest) -> None:
    if not 0 <= request.page_size <= MAX_PAGE_SIZE:
        raise InvalidRequestError("page_size", request.page_size, f"must be 0 to {MAX_PAGE_SIZE}")
    _validate_length("page_token", request.page_token, MAX_REFERENCE_CHARS)
    validate_prefix(request.prefix)
    if len(request.states) > MAX_STATES:
        raise InvalidRequestError("states", len(request.states), f"must be at most {MAX_STATES}")
    for state in request.states:
        if state == adapters_pb2.ADAPTER_STATE_UNSPECIFIED or state not in adapters_pb2.AdapterState.values():
            raise InvalidRequestError("states", state, "is not a state")


def validate_prefix(prefix: str) -> None:
    _validate_length("prefix", prefix, MAX_REFERENCE_CHARS)


def validate_version(name: str, version: str) -> None:
    check_name("name", name)
    _validate_length("version", version, MAX_VERSION_CHARS)


def validate_unload(request: adapters_pb2.UnloadAdapterRequest) -> None:
    validate_name(request.name)
    if request.delete_upload and parse_reference("name", request.name).is_exact:
        raise InvalidRequestError("delete_upload", True, "is for a name with all its versions, not for one of them")


def validate_load(request: adapters_pb2.LoadAdapterRequest) -> None:
    check_name("name", request.name)
    _validate_length("path", request.path, MAX_PATH_CHARS)


def validate_upload_header(header: adapters_pb2.AdapterUploadHeader) -> None:
    """How many files there are; what each has to be is `Manifest`'s to say."""
    _validate_count("header.files", header.files, MAX_UPLOAD_FILES)


def validate_upload_part(request: adapters_pb2.UploadAdapterRequest, *, is_first: bool) -> None:
    expected = "header" if is_first else "chunk"
    if request.WhichOneof("part") != expected:
        raise InvalidRequestError("part", request.WhichOneof("part"), f"must be a {expected} here")
    if is_first:
        validate_upload_header(request.header)
    elif not 1 <= len(request.chunk.data) <= MAX_CHUNK_BYTES:
        problem = f"must be 1 to {MAX_CHUNK_BYTES} bytes"
        raise InvalidRequestError("chunk.data", f"{len(request.chunk.data)} bytes", problem)


def validate_request_id(request_id: str) -> None:
    _validate_length("request_id", request_id, MAX_REQUEST_ID_CHARS)
    if not REQUEST_ID.fullmatch(request_id):
        raise InvalidRequestError("request_id", request_id, "must be printable ASCII without spaces")


def validate_usage(request: server_pb2.GetUsageRequest) -> None:
    if not 0 <= request.page_size <= MAX_PAGE_SIZE:
        raise InvalidRequestError("page_size", request.page_size, f"must be 0 to {MAX_PAGE_SIZE}")
    _validate_length("page_token", request.page_token, MAX_REFERENCE_CHARS)
    _validate_length("tenant", request.tenant, MAX_NAME_CHARS)


def validate_named_request(request: server_pb2.AbortRequestRequest | server_pb2.ExplainRequestRequest) -> None:
    if not request.request_id:
        raise InvalidRequestError("request_id", request.request_id, "must not be empty")
    validate_request_id(request.request_id)


def validate_sampling(sampling: generation_pb2.SamplingParams) -> None:
    _validate_range("sampling.temperature", sampling.temperature, 0, MAX_FLOAT32)
    if sampling.HasField("top_p"):
        _validate_range("sampling.top_p", sampling.top_p, 0, 1, above=True)
    if sampling.top_k < 0:
        raise InvalidRequestError("sampling.top_k", sampling.top_k, "must be at least 0 (0: off)")
    _validate_range("sampling.min_p", sampling.min_p, 0, 1)
    if sampling.HasField("repetition_penalty"):
        penalty = sampling.repetition_penalty
        _validate_range("sampling.repetition_penalty", penalty, MIN_FLOAT32, MAX_REPETITION_PENALTY)
    _validate_range("sampling.presence_penalty", sampling.presence_penalty, -MAX_PENALTY, MAX_PENALTY)
    _validate_range("sampling.frequency_penalty", sampling.frequency_penalty, -MAX_PENALTY, MAX_PENALTY)
    _validate_count("sampling.logit_bias", sampling.logit_bias, MAX_LOGIT_BIAS)
    _validate_token_ids("sampling.logit_bias", sampling.logit_bias)
    for token_id, bias in sampling.logit_bias.items():
        _validate_range(f"sampling.logit_bias[{token_id}]", bias, -MAX_BIAS, MAX_BIAS)


def validate_stopping(stopping: generation_pb2.StoppingParams) -> None:
    if stopping.HasField("max_tokens") and stopping.max_tokens < 1:
        raise InvalidRequestError("stopping.max_tokens", stopping.max_tokens, "must be at least 1")
    if stopping.min_tokens < 0:
        raise InvalidRequestError("stopping.min_tokens", stopping.min_tokens, "must be at least 0")
    if stopping.HasField("max_tokens") and stopping.min_tokens > stopping.max_tokens:
        problem = f"must be at most max_tokens, which is {stopping.max_tokens}"
        raise InvalidRequestError("stopping.min_tokens", stopping.min_tokens, problem)
    _validate_count("stopping.stop", stopping.stop, MAX_STOP_STRINGS)
    for index, stop in enumerate(stopping.stop):
        if not stop:
            raise InvalidRequestError(f"stopping.stop[{index}]", stop, "must not be empty")
        _validate_length(f"stopping.stop[{index}]", stop, MAX_STOP_CHARS)
    _validate_count("stopping.stop_token_ids", stopping.stop_token_ids, MAX_STOP_TOKEN_IDS)
    _validate_token_ids("stopping.stop_token_ids", stopping.stop_token_ids)


def validate_response(response: generation_pb2.ResponseParams) -> None:
    if not 0 <= response.top_logprobs <= MAX_TOP_LOGPROBS:
        raise InvalidRequestError("response.top_logprobs", response.top_logprobs, f"must be 0 to {MAX_TOP_LOGPROBS}")
    if response.top_logprobs and not response.logprobs:
        raise InvalidRequestError("response.top_logprobs", response.top_logprobs, "needs response.logprobs")
    if response.HasField("min_tokens_per_message") and not (
        1 <= response.min_tokens_per_message <= MAX_TOKENS_PER_MESSAGE
    ):
        problem = f"must be 1 to {MAX_TOKENS_PER_MESSAGE}"
        raise InvalidRequestError("response.min_tokens_per_message", response.min_tokens_per_message, problem)


def validate_structured_output(wanted: generation_pb2.StructuredOutput) -> None:
    """What a schema or a grammar may say is the engine's to judge."""
    match wanted.WhichOneof("format"):
        case "json_schema":
            _validate_source("structured_output.json_schema", wanted.json_schema, MAX_GRAMMAR_BYTES)
        case "regex":
            _validate_source("structured_output.regex", wanted.regex, MAX_REGEX_BYTES)
        case "grammar":
            _validate_source("structured_output.grammar", wanted.grammar, MAX_GRAMMAR_BYTES)
        case "choice":
            _validate_choice(wanted.choice.texts)
        case "json_object":
            if not wanted.json_object:
                raise InvalidRequestError("structured_output.json_object", False, "can only be true")
        case _:
            raise InvalidRequestError(
                "structured_output", None, "set one of json_schema, regex, grammar, choice and json_object"
            )


def _validate_adapters(request: AnyGenerateRequest) -> None:
    if request.adapters and request.adapter:
        raise InvalidRequestError("adapters", request.adapter, "set adapter or adapters, not both")
    _validate_count("adapters", request.adapters, MAX_MIXED_ADAPTERS)
    for index, one in enumerate(request.adapters):
        place = f"adapters[{index}]"
        if not one.name:
            raise InvalidRequestError(f"{place}.name", one.name, "must not be empty")
        _validate_length(f"{place}.name", one.name, MAX_REFERENCE_CHARS)
        if one.HasField("weight"):
            _validate_range(f"{place}.weight", one.weight, -MAX_ADAPTER_WEIGHT, MAX_ADAPTER_WEIGHT)
            if one.weight == 0:
                raise InvalidRequestError(f"{place}.weight", one.weight, "must not be 0")


def _validate_choice(texts: Sequence[str]) -> None:
    field = "structured_output.choice.texts"
    if not texts:
        raise InvalidRequestError(field, [], "must not be empty")
    _validate_count(field, texts, MAX_CHOICES)
    for index, text in enumerate(texts):
        if not text:
            raise InvalidRequestError(f"{field}[{index}]", text, "must not be empty")
    _validate_bytes(field, sum(len(text.encode()) for text in texts), MAX_GRAMMAR_BYTES)


def _validate_source(field: str, source: str, max_bytes: int) -> None:
    if not source:
        raise InvalidRequestError(field, source, "must not be empty")
    _validate_bytes(field, len(source.encode()), max_bytes)


def _validate_prompt(request: AnyGenerateRequest) -> None:
    match request.WhichOneof("prompt"):
        case "text":
            _validate_text(request.text)
        case "token_ids":
            ids = request.token_ids.ids
            if not ids:
                raise InvalidRequestError("token_ids.ids", [], "must not be empty")
            _validate_count("token_ids.ids", ids, MAX_PROMPT_TOKEN_IDS)
            _validate_token_ids("token_ids.ids", ids)
        case "messages":
            _validate_messages(request.messages)
        case _:
            raise InvalidRequestError("prompt", None, "set one of text, token_ids and messages")


def _validate_text(text: str) -> None:
    if not text:
        raise InvalidRequestError("text", text, "must not be empty")
    _validate_bytes("text", len(text.encode()))


def _validate_messages(chat: generation_pb2.ChatMessages) -> None:
    messages = chat.messages
    if not messages:
        raise InvalidRequestError("messages.messages", [], "must not be empty")
    _validate_count("messages.messages", messages, MAX_MESSAGES)
    _validate_count("messages.tools", chat.tools, MAX_TOOLS)
    _validate_bytes("messages.messages", sum(len(text.encode()) for text in _texts(chat)))
    for index, message in enumerate(messages):
        place = f"messages.messages[{index}]"
        if not message.role:
            raise InvalidRequestError(f"{place}.role", message.role, "must not be empty")
        _validate_length(f"{place}.role", message.role, MAX_ROLE_CHARS)
        _validate_count(f"{place}.tool_calls", message.tool_calls, MAX_TOOLS)
        for number, call in enumerate(message.tool_calls):
            _validate_object(f"{place}.tool_calls[{number}].arguments", call.arguments)
    for index, tool in enumerate(chat.tools):
        if not tool.name:
            raise InvalidRequestError(f"messages.tools[{index}].name", tool.name, "must not be empty")
        _validate_object(f"messages.tools[{index}].parameters", tool.parameters)


def _texts(chat: generation_pb2.ChatMessages) -> Iterator[str]:
    for message in chat.messages:
        yield message.content
        yield from (call.arguments for call in message.tool_calls)
    for tool in chat.tools:
        yield from (tool.name, tool.description, tool.parameters)


def _validate_object(field: str, text: str) -> None:
    """Empty, or a JSON object."""
    if not text:
        return
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise InvalidRequestError(field, text[:100], "must be a JSON object")


def _validate_bytes(field: str, num_bytes: int, maximum: int = MAX_TEXT_BYTES) -> None:
    if num_bytes > maximum:
        raise InvalidRequestError(field, f"{num_bytes} bytes", f"must be at most {maximum} bytes of UTF-8")


def _validate_length(field: str, text: str, max_chars: int) -> None:
    if len(text) > max_chars:
        raise InvalidRequestError(field, f"{len(text)} characters", f"must be at most {max_chars} characters")


def _validate_count(field: str, items: Collection[object], maximum: int) -> None:
    if len(items) > maximum:
        raise InvalidRequestError(field, f"{len(items)} entries", f"must have at most {maximum} entries")


def _validate_token_ids(field: str, ids: Iterable[int]) -> None:
    smallest = min(ids, default=0)
    if smallest < 0:
        raise InvalidRequestError(field, smallest, "a token id must be at least 0")


def _validate_range(field: str, value: float, low: float, high: float, *, above: bool = False) -> None:
    """`low` to `high`, `low` itself left out with `above`. Comparisons with NaN are false, so it fails as well."""
    if not (low < value <= high if above else low <= value <= high):
        bounds = f"above {low:g} and at most {high:g}" if above else f"{low:g} to {high:g}"
        raise InvalidRequestError(field, value, f"must be {bounds}")
