"""Bodies to our messages. Decides nothing: what a message may hold is checked where gRPC's are.

The base model is asked for by its name, and everything else is an adapter.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from gralora.v1 import generation_pb2, server_pb2
from gralora_runtime.errors import InvalidRequestError
from gralora_server.field_names import renamed
from gralora_server.http.bodies import (
    MAX_CHOICES,
    ChatBody,
    CompletionBody,
    NamedTool,
    ObjectFormat,
    PromptBody,
    Sampled,
    SchemaFormat,
    Turn,
)
from gralora_server.sampling_names import REALS
from gralora_server.structured_outputs import put_structured

# gRPC's names of fields, where those of a body are others.
FIELDS = (
    ("sampling.", ""),
    ("stopping.", ""),
    ("response.", ""),
    ("messages.messages", "messages"),
    ("messages.tools", "tools"),
    ("token_ids.ids", "prompt"),
    ("token_ids", "prompt"),
    ("text", "prompt"),
    ("adapters", "adapters"),
    ("adapter", "model"),
    ("canary_key", "user"),
    ("structured_output.", "structured_outputs."),
)


def chat_requests(body: ChatBody, *, base: str, request_id: str) -> list[generation_pb2.StreamGenerateRequest]:
    """One for each choice."""
    asked = _common(body, base)
    asked.messages.messages.extend(_turns(body.messages))
    asked.messages.tools.extend(_tools(body))
    asked.messages.continue_final_message = body.continue_final_message
    if body.add_generation_prompt == body.continue_final_message:
        problem = "is the other of continue_final_message: one of them is true"
        raise InvalidRequestError("add_generation_prompt", body.add_generation_prompt, problem)
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    if max_tokens is not None:
        asked.stopping.max_tokens = max_tokens
    asked.response.logprobs = bool(body.logprobs)
    asked.response.top_logprobs = body.top_logprobs or 0
    return list(_numbered([asked], body.n, request_id))


def completion_requests(
    body: CompletionBody, *, base: str, request_id: str
) -> list[generation_pb2.StreamGenerateRequest]:
    """One for each choice: all of the first prompt, then of the next."""
    shared = _common(body, base)
    if body.max_tokens is not None:
        shared.stopping.max_tokens = body.max_tokens
    if body.logprobs is not None:
        shared.response.logprobs, shared.response.top_logprobs = True, body.logprobs
    asked = []
    for prompt in prompts_of(body):
        one = generation_pb2.StreamGenerateRequest()
        one.CopyFrom(shared)
        if isinstance(prompt, str):
            one.text = prompt
        else:
            one.token_ids.ids.extend(prompt)
        asked.append(one)
    return list(_numbered(asked, body.n, request_id))


def prompts_of(body: CompletionBody) -> Sequence[str | list[int]]:
    """Raises InvalidRequestError if they are none, or too many."""
    prompts: Sequence[str | list[int]]
    if isinstance(body.prompt, str):
        prompts = [body.prompt]
    elif body.prompt and isinstance(body.prompt[0], int):
        prompts = [[token for token in body.prompt if isinstance(token, int)]]
    else:
        prompts = [one for one in body.prompt if not isinstance(one, int)]
    if not 1 <= len(prompts) * body.n <= MAX_CHOICES:
        problem = f"must be 1 to {MAX_CHOICES} choices, prompts times n"
        raise InvalidRequestError("prompt", len(prompts) * body.n, problem)
    return prompts


def tokenize_request(body: PromptBody) -> server_pb2.TokenizeRequest:
    """What is not set stays so."""
    asked = server_pb2.TokenizeRequest()
    if body.prompt is not None:
        asked.text = body.prompt
    if body.messages is not None:
        asked.messages.messages.extend(_turns(body.messages))
    return asked


def in_their_words(error: InvalidRequestError) -> InvalidRequestError:
    """The same, with the field as a body has it."""
    return renamed(error, FIELDS)


def _common(body: Sampled, base: str) -> generation_pb2.StreamGenerateRequest:
    asked = generation_pb2.StreamGenerateRequest(
        adapter="" if body.model == base else body.model, canary_key=body.user or "", priority=body.priority
    )
    asked.adapters.extend(_adapters(body, base))
    sampling, stopping = asked.sampling, asked.stopping
    for name in REALS:
        if (value := getattr(body, name)) is not None:
            setattr(sampling, name, value)
    if body.seed is not None:
        sampling.seed = body.seed
    sampling.top_k = 0 if body.top_k in (None, -1) else body.top_k
    for token, bias in (body.logit_bias or {}).items():
        sampling.logit_bias[_token_id(token)] = _bias(token, bias)
    stopping.min_tokens = body.min_tokens
    stopping.stop.extend([body.stop] if isinstance(body.stop, str) else body.stop or ())
    stopping.stop_token_ids.extend(body.stop_token_ids or ())
    stopping.ignore_eos = body.ignore_eos
    _structure(body, asked.structured_output)
    return asked


def _adapters(body: Sampled, base: str) -> Iterator[generation_pb2.WeightedAdapter]:
    """Raises InvalidRequestError where the body names one beside them."""
    if body.adapters and body.model != base:
        raise InvalidRequestError("model", body.model, f"must be {base!r}, the base model, where adapters are given")
    for at, one in enumerate(body.adapters or ()):
        one.checked(f"adapters[{at}]")
        yield generation_pb2.WeightedAdapter(name=one.name, weight=one.weight)


def _structure(body: Sampled, output: generation_pb2.StructuredOutput) -> None:
    """Left empty where the answer may be anything."""
    wanted = body.response_format
    if isinstance(wanted, ObjectFormat):
        output.json_object = True
    elif isinstance(wanted, SchemaFormat):
        output.json_schema = json.dumps(wanted.json_schema.schema_)
    if body.structured_outputs is not None:
        put_structured(body.structured_outputs, output, place="structured_outputs")


def _numbered(
    asked: Sequence[generation_pb2.StreamGenerateRequest], n: int, request_id: str
) -> Iterator[generation_pb2.StreamGenerateRequest]:
    """`n` of each, with ids and seeds of their own."""
    is_alone = len(asked) * n == 1
    for number in range(len(asked) * n):
        one = generation_pb2.StreamGenerateRequest()
        one.CopyFrom(asked[number // n])
        one.request_id = request_id if is_alone or not request_id else f"{request_id}-{number}"
        if one.sampling.HasField("seed"):
            one.sampling.seed = (one.sampling.seed + number % n) % 2**64
        yield one


def _turns(turns: Sequence[Turn]) -> Iterator[generation_pb2.ChatMessage]:
    for turn in turns:
        calls = [
            generation_pb2.ToolCall(id=call.id, name=call.function.name, arguments=call.function.arguments)
            for call in turn.tool_calls or ()
        ]
        yield generation_pb2.ChatMessage(
            role=turn.role,
            content=turn.text,
            tool_calls=calls,
            tool_call_id=turn.tool_call_id or "",
            name=turn.name or "",
        )


def _tools(body: ChatBody) -> Iterator[generation_pb2.Tool]:
    """Raises InvalidRequestError if there is none that could be called as the body asks for it."""
    if body.tool_choice == "none":
        return
    if body.parallel_tool_calls is False and body.tools and not body.forces_calls:
        problem = "can only be true, unless tool_choice is required or names a tool"
        raise InvalidRequestError("parallel_tool_calls", False, problem)
    if body.forces_calls and not body.tools:
        raise InvalidRequestError("tool_choice", _chosen(body), "needs tools")
    for tool in body.tools or ():
        function = tool.function
        yield generation_pb2.Tool(
            name=function.name,
            description=function.description or "",
            parameters="" if function.parameters is None else json.dumps(function.parameters),
        )


def called_tools(body: ChatBody, tools: Sequence[generation_pb2.Tool]) -> list[generation_pb2.Tool]:
    """Those of which the answer has to call one; empty if it need not. Raises InvalidRequestError."""
    if not body.forces_calls:
        return []
    chosen = _chosen(body)
    found = [tool for tool in tools if body.tool_choice == "required" or tool.name == chosen]
    if not found:
        raise InvalidRequestError("tool_choice.function.name", chosen, "is none of the tools")
    if body.response_format is not None or body.structured_outputs is not None:
        problem = "asks for calls, and nothing else may say what the answer matches"
        raise InvalidRequestError("tool_choice", chosen, problem)
    return found


def _chosen(body: ChatBody) -> str | None:
    return body.tool_choice.function.name if isinstance(body.tool_choice, NamedTool) else body.tool_choice


def _token_id(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 9):
        raise InvalidRequestError("logit_bias", text, "must have token ids as keys")
    return int(text)


def _bias(token: str, bias: object) -> float:
    if isinstance(bias, bool) or not isinstance(bias, int | float):
        raise InvalidRequestError(f"logit_bias[{token}]", bias, "must be a number")
    return bias
