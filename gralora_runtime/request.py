"""The vocabulary of a generation: what a caller asks for and what it gets back. Plain values, no torch, no policy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen. `temperature` 0 is greedy; every other default leaves the distribution alone."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # over prompt and output, as in transformers
    presence_penalty: float = 0.0  # over the output, as in OpenAI's API
    frequency_penalty: float = 0.0  # over the output, as in OpenAI's API
    seed: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoppingParams:
    """When a generation ends. `max_tokens` None: as many as the context window leaves room for."""

    max_tokens: int | None = None
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseParams:
    """What to report beside the text."""

    logprobs: bool = False
    top_logprobs: int = 0  # alternatives per token, 0..20
    echo_prompt_token_ids: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutput:
    """What the text of an answer has to match. Exactly one of the five is set."""

    json_schema: str | None = None
    regex: str | None = None
    grammar: str | None = None  # llguidance's variant of Lark
    choice: tuple[str, ...] | None = None
    json_object: bool = False


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One that the model made. `arguments`: a JSON object."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Tool:
    """What the model may call. `parameters`: a JSON schema, or ""."""

    name: str
    description: str
    parameters: str


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn of a conversation, for the model's chat template."""

    role: str
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""
    name: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """Exactly one of the first three is set; the engine turns it into token ids. The others belong to messages."""

    text: str | None = None
    token_ids: tuple[int, ...] | None = None
    messages: tuple[ChatMessage, ...] | None = None
    tools: tuple[Tool, ...] = ()
    continues: bool = False  # the last turn, instead of asking for the next


@dataclass(frozen=True, slots=True)
class WeightedAdapter:
    """One of several adapters whose updates are added up."""

    adapter: str  # a name, or one version
    weight: float = 1.0  # finite and not 0; rounded to float32


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One request as it enters the engine. `adapter` "" is the base model, unless `adapters` says more.

    Tenants share what there is by their weights, and requests of one tenant are served by their priority.
    """

    request_id: str
    prompt: Prompt
    adapter: str = ""  # a name, or one version: see `adapters/catalogue/names.py`
    adapters: tuple[WeightedAdapter, ...] = ()  # instead of `adapter`: the sum of these
    canary_key: str = ""  # requests of one key get the same version; "": drawn by request_id
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stopping: StoppingParams = field(default_factory=StoppingParams)
    response: ResponseParams = field(default_factory=ResponseParams)
    structured_output: StructuredOutput | None = None
    timeout_s: float | None = None  # from now; None: no deadline
    tenant: str = ""  # whose request it is; "": its adapter is a tenant of its own
    weight: float = 1.0  # of the tenant
    max_queued_requests: int | None = None  # of the tenant, that wait for their first token
    max_queued_tokens: int | None = None  # of their prompts
    priority: int = 0  # higher first, among those of the same tenant
    prefix_scope: str = ""  # prefixes are shared with requests of the same scope, for the same adapter, alone
    base_prefix_scope: str = ""  # instead, where the adapter leaves what comes first to the base model
    trace_id: str = ""  # of the trace that is to have it, in hexadecimal; "": none

    @property
    def named_adapters(self) -> tuple[str, ...]:
        """All that it names, as it names them; none for the base model."""
        return tuple(one.adapter for one in self.adapters) or ((self.adapter,) if self.adapter else ())


class FinishReason(Enum):
    """Why a generation ended normally. Failures are exceptions, never a reason."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"

    @property
    def is_whole(self) -> bool:
        """Nothing broke the answer off."""
        return self in (FinishReason.STOP, FinishReason.LENGTH)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural-log probability of a token under the model's raw distribution (before penalties and temperature)."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob), best first


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedAdapter:
    """One of the adapters whose sum serves a request."""

    name: str
    version: int
    digest: str
    weight: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """On the first delta: what really serves this request."""

    prompt_tokens: int
    cached_tokens: int  # of the prompt, found in the prefix cache
    queue_time_s: float
    seed: int
    adapter: str  # a mix is called like "pirate*0.7+poet"
    adapter_digest: str  # "" for the base model
    prompt_token_ids: tuple[int, ...] = ()
    adapter_version: int = 0  # 0 for the base model, and for a mix
    adapters: tuple[ServedAdapter, ...] = ()  # that a mix is the sum of


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """On the last delta."""

    reason: FinishReason
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    stop_string: str | None = None  # which one matched
    stop_token_id: int | None = None  # which one matched (a stop id or the model's EOS)
    preemptions: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """What one or more steps added to one request. Text never ends inside a character."""

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    started: Started | None = None
    finished: Finished | None = None
