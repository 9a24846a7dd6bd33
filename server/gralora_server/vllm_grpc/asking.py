"""A request of this protocol to a message of ours, and to what its client wants to hear.

What it asks for that this server does not do is refused by its field. All else is checked where gRPC's requests are.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from gralora.foreign import vllm_pb2
from gralora.v1 import generation_pb2
from gralora_runtime.errors import InvalidRequestError
from gralora_server.validation import MAX_PRIORITY, MAX_TOP_LOGPROBS
from gralora_server.vllm_grpc.not_served import check_served

MAX_TOKENS = 20  # if a request does not say how many
NUM_CANDIDATES = 1  # if it wants log probabilities, and does not say of how many others
NO_SEED = -1
MAX_INT32 = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One request. `generation` is ours, and is written to on its way through the server."""

    generation: generation_pb2.StreamGenerateRequest
    text: bool
    token_ids: bool
    logprobs: bool
    num_candidates: int  # of the likeliest tokens


def read_request(request: vllm_pb2.GenerateRequest, *, base: str) -> Asked:
    """`base`: the base model's name. Raises InvalidRequestError naming a field of theirs."""
    if request.model not in ("", base):
        problem = f"must be empty or {base!r}, the base model: lora_name names an adapter"
        raise InvalidRequestError("model", request.model, problem)
    check_served(request)
    generation = generation_pb2.StreamGenerateRequest(
        request_id=request.request_id,
        adapter=request.lora_name,
        canary_key=request.session_id,
        priority=_priority(request.priority),
    )
    _put_prompt(request, generation)
    _put_sampling(request, generation.sampling)
    _put_stopping(request.stopping, generation.stopping)
    _put_structured_output(request.decoding, generation.structured_output)
    response = request.response
    generation.response.echo_prompt_token_ids = response.prompt_token_ids
    if response.output_logprobs:
        generation.response.logprobs = True
        generation.response.top_logprobs = MAX_TOP_LOGPROBS  # a token's rank is its place among them
    return Asked(
        generation=generation,
        text=response.output_text if response.HasField("output_text") else True,
        token_ids=response.output_token_ids,
        logprobs=response.output_logprobs,
        num_candidates=_num_candidates(response),
    )


def _priority(theirs: int) -> int:
    """Their lowest comes first, and our highest."""
    if abs(theirs) > MAX_PRIORITY:
        raise InvalidRequestError("priority", theirs, f"must be -{MAX_PRIORITY} to {MAX_PRIORITY}")
    return -theirs


def _put_prompt(request: vllm_pb2.GenerateRequest, generation: generation_pb2.StreamGenerateRequest) -> None:
    """Neither, where there is none."""
    match request.WhichOneof("prompt"):
        case "text":
            generation.text = request.text
        case "token_ids":
            ids = _token_ids("token_ids.ids", request.token_ids.ids)
            generation.token_ids.CopyFrom(generation_pb2.TokenIds(ids=ids))  # there even if it is empty


def _put_sampling(request: vllm_pb2.GenerateRequest, sampling: generation_pb2.SamplingParams) -> None:
    """Of theirs, a number that is 0 was not given; a temperature that was not is 0."""
    drawing, decoding = request.sampling, request.decoding
    sampling.temperature = request.temperature
    sampling.top_k = _int32("sampling.top_k", drawing.top_k)
    if drawing.top_p:
        sampling.top_p = drawing.top_p
    sampling.min_p = drawing.min_p
    if drawing.HasField("seed") and drawing.seed != NO_SEED:
        if drawing.seed < 0:
            raise InvalidRequestError("sampling.seed", drawing.seed, f"must be at least 0, or {NO_SEED} for none")
        sampling.seed = drawing.seed
    sampling.presence_penalty = decoding.presence_penalty
    sampling.frequency_penalty = decoding.frequency_penalty
    if decoding.repetition_penalty:
        sampling.repetition_penalty = decoding.repetition_penalty
    for token_id in _token_ids("decoding.logit_bias", decoding.logit_bias):
        sampling.logit_bias[token_id] = decoding.logit_bias[token_id]


def _put_stopping(theirs: vllm_pb2.StoppingCriteria, stopping: generation_pb2.StoppingParams) -> None:
    stopping.max_tokens = _int32("stopping.max_new_tokens", theirs.max_new_tokens) or MAX_TOKENS
    stopping.min_tokens = _int32("stopping.min_new_tokens", theirs.min_new_tokens)
    stopping.stop.extend(theirs.stop_strings)
    stopping.stop_token_ids.extend(_token_ids("stopping.stop_token_ids", theirs.stop_token_ids))
    stopping.ignore_eos = theirs.ignore_eos


def _put_structured_output(decoding: vllm_pb2.DecodingParameters, output: generation_pb2.StructuredOutput) -> None:
    """Left empty where the answer may be anything."""
    match decoding.WhichOneof("structured_output"):
        case "json":
            output.json_schema = decoding.json
        case "regex":
            output.regex = decoding.regex
        case "choice":
            texts = decoding.choice.choices
            output.choice.CopyFrom(generation_pb2.Choices(texts=texts))  # there even if it is empty
        case "grammar":
            output.grammar = decoding.grammar
        case "json_object" if decoding.json_object:
            output.json_object = True


def _num_candidates(response: vllm_pb2.ResponseOptions) -> int:
    if not response.HasField("output_candidates"):
        return NUM_CANDIDATES
    wanted = response.output_candidates
    if not response.output_logprobs:
        raise InvalidRequestError("response.output_candidates", wanted.top_n, "needs response.output_logprobs")
    if wanted.top_n > MAX_TOP_LOGPROBS:
        problem = f"must be 0 to {MAX_TOP_LOGPROBS}"
        raise InvalidRequestError("response.output_candidates.top_n", wanted.top_n, problem)
    return wanted.top_n if wanted.HasField("top_n") else NUM_CANDIDATES


def _token_ids(field: str, ids: Collection[int]) -> Collection[int]:
    _int32(field, max(ids, default=0))
    return ids


def _int32(field: str, value: int) -> int:
    """Theirs may be twice as large as ours."""
    if value > MAX_INT32:
        raise InvalidRequestError(field, value, f"must be at most {MAX_INT32}")
    return value
