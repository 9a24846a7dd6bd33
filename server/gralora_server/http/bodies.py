"""Bodies of requests, as OpenAI's clients and vLLM's send them. What they may hold beyond their types is decided where
gRPC's requests are checked.

A field that nothing here knows is refused, since whoever sent it expects something of it; so are known ones with a
value that we could only ignore. Of turns, which clients send back as they got them, unknown fields are ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field

from gralora_server.json_values import List, Part, Whole, refuse_unknown
from gralora_server.sampling_names import FIXED, check_fixed
from gralora_server.structured_outputs import StructuredOutputs

MAX_CHOICES = 64  # of one request
Int32 = Annotated[int, Field(ge=-(2**31), le=2**31 - 1)]


TokenIds = List[Int32]


class StreamOptions(Part):
    include_usage: bool = Field(default=False, description="One more event, with the usage of all choices.")
    continuous_usage_stats: bool = Field(
        default=False, description="Each event has the usage of its choice so far; as vLLM has it, with include_usage."
    )


class TextFormat(Part):
    type: Literal["text"]


class ObjectFormat(Part):
    type: Literal["json_object"]


class NamedSchema(Part):
    schema_: dict[str, Any] = Field(alias="schema")


class SchemaFormat(Part):
    type: Literal["json_schema"]
    json_schema: NamedSchema


class WeightedAdapter(Whole):
    name: str
    weight: float | None = Field(default=None, description="Not 0; null: 1.")


class Sampled(Whole):
    """What both ways to ask for text share."""

    model: str = Field(min_length=1, description="The base model's name, an adapter's, or NAME@VERSION.")
    adapters: List[WeightedAdapter] | None = Field(
        default=None, description="The sum of several, of which each is multiplied by its weight; model is the base's."
    )
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = Field(default=1, description="Choices for each prompt.")
    stream: bool = Field(default=False, description="Server-sent events.")
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Int32 | None = Field(default=None, description="0 or -1: off.")
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: Annotated[int, Field(ge=0, lt=2**64)] | None = Field(
        default=None, description="Of the first choice; each other one's is one more."
    )
    logit_bias: dict[str, Any] | None = Field(default=None, description="Numbers, by token id.")
    min_tokens: Int32 = 0
    stop: str | List[str] | None = None
    stop_token_ids: TokenIds | None = None
    ignore_eos: bool = False
    priority: Int32 = Field(default=0, description="Among the requests of one tenant; higher first.")
    user: str | None = Field(default=None, description="Requests of one user get the same version of a canary.")
    return_token_ids: bool = False
    response_format: Annotated[TextFormat | ObjectFormat | SchemaFormat, Field(discriminator="type")] | None = Field(
        default=None, description="What the answer has to match."
    )
    structured_outputs: StructuredOutputs | None = Field(default=None, description="The same, as vLLM has it.")
    # Sent by clients, and without meaning here.
    metadata: dict[str, Any] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: Literal[False] | None = None

    def checked(self, place: str = "") -> Self:
        unknown = dict(self.model_extra or {})
        for name in FIXED.keys() & unknown.keys():
            if (value := unknown.pop(name)) is not None:
                check_fixed(name, value)
        refuse_unknown(unknown, place)
        return self

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def includes_running_usage(self) -> bool:
        return self.includes_usage and self.stream_options is not None and self.stream_options.continuous_usage_stats


class CompletionBody(Sampled):
    """Of `/v1/completions`."""

    prompt: str | List[str] | TokenIds | List[TokenIds]
    max_tokens: Int32 | None = Field(default=16, description="null: as many as the context window leaves room for.")
    logprobs: Int32 | None = Field(default=None, description="Also of so many of the likeliest tokens.")
    best_of: Literal[1] | None = None
    echo: Literal[False] = False
    suffix: Literal[""] | None = None


class TextPart(Part):
    type: Literal["text"]
    text: str


class CalledFunction(Part):
    name: str
    arguments: str = ""


class CalledTool(Part):
    id: str = ""
    function: CalledFunction


class Turn(Part):
    """Of a conversation."""

    role: str
    content: str | List[TextPart] | None = None
    name: str | None = None
    tool_calls: List[CalledTool] | None = None
    tool_call_id: str | None = None

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class Function(Part):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = Field(default=None, description="A JSON schema of an object.")


class FunctionTool(Part):
    type: Literal["function"]
    function: Function


class NamedFunction(Part):
    name: str


class NamedTool(Part):
    type: Literal["function"]
    function: NamedFunction


class ChatBody(Sampled):
    """Of `/v1/chat/completions`."""

    messages: List[Turn]
    max_tokens: Int32 | None = None
    max_completion_tokens: Int32 | None = Field(default=None, description="Goes before max_tokens.")
    logprobs: bool | None = False
    top_logprobs: Int32 | None = None
    tools: List[FunctionTool] | None = Field(default=None, description="What the model may call.")
    tool_choice: Literal["auto", "none", "required"] | NamedTool | None = Field(
        default=None, description="Required, or a tool by its name: the answer is nothing but calls."
    )
    parallel_tool_calls: bool | None = Field(default=None, description="false only where tool_choice asks for calls.")
    continue_final_message: bool = Field(default=False, description="Go on with the last turn; without a new one.")
    add_generation_prompt: bool | None = Field(default=None, description="The other of continue_final_message.")

    @property
    def forces_calls(self) -> bool:
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedTool)


class PromptBody(Whole):
    """Of `/tokenize`: a text, or a conversation."""

    model: str = Field(default="", description="All adapters have the base model's tokenizer.")
    prompt: str | None = None
    messages: List[Turn] | None = None


class LoadBody(Whole):
    """Of `/v1/load_lora_adapter`, as vLLM has it."""

    lora_name: str
    lora_path: str = Field(default="", description="Where its files lie; empty: found by its name.")
    load_inplace: bool = Field(default=False, description="Always so: what has changed becomes a new version.")


class UnloadBody(Whole):
    """Of `/v1/unload_lora_adapter`, as vLLM has it."""

    lora_name: str
    lora_int_id: int | None = None
