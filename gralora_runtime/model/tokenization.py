"""Prompts to token ids: plain text, ids, or messages through the model's chat template. Knows no request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError
from tokenizers import Tokenizer

from gralora_runtime.errors import InvalidRequestError
from gralora_runtime.model.chat_turns import as_template_has_it, knows_tools, tool_as_template_has_it
from gralora_runtime.model.prompt_bound import prompt_bound
from gralora_runtime.request import Prompt

# From here on a text takes 10 ms and more. `Tokenizer.encode` keeps Python's lock all the while, and no stream would
# get a token; `encode_batch_fast` gives it back, but waits for a thread of a pool that all such calls share.
LONG_CHARS = 16_384


def is_long(prompt: Prompt) -> bool:
    """Whether it takes so long to tokenize that nothing short should wait for it."""
    texts = [prompt.text or "", *(message.content for message in prompt.messages or ())]
    texts += [call.arguments for message in prompt.messages or () for call in message.tool_calls]
    texts += [text for tool in prompt.tools for text in (tool.description, tool.parameters)]
    return sum(map(len, texts)) >= LONG_CHARS


class PromptTokenizer:
    """Thread-safe: neither tokenizer is changed after construction."""

    def __init__(self, tokenizer: Tokenizer, chat_tokenizer: Any, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._chat_tokenizer = chat_tokenizer
        self._vocab_size = vocab_size
        tokenizer.no_truncation()  # a checkpoint may ask for it; a prompt is served whole or refused
        tokenizer.no_padding()
        self._bound = prompt_bound(tokenizer)

    def encode(self, prompt: Prompt, *, shorter_than: int | None = None, added_tokens: int = 0) -> list[int]:
        """Token ids of a prompt, at least one. Raises `InvalidRequestError` naming the field.

        What has so many bytes that it cannot be `shorter_than` tokens is refused before it is tokenized. So many ids
        may be `added_tokens`, behind the model's.
        """
        if prompt.token_ids is not None:
            num_tokens = len(prompt.token_ids)
            _check_length(num_tokens, shorter_than, got=num_tokens)
            check_ids("token_ids", prompt.token_ids, self._vocab_size + added_tokens)
            field, ids = "token_ids", list(prompt.token_ids)
        elif prompt.messages is not None:
            text = self._render(prompt)
            field, ids = "messages", self._encode_text(text, shorter_than, add_special_tokens=False)
        else:
            field, ids = "text", self._encode_text(prompt.text or "", shorter_than, add_special_tokens=True)
        if not ids:
            raise InvalidRequestError(field, getattr(prompt, field), "the prompt is empty")
        return ids

    def text_of(self, token_id: int) -> str:
        """One token alone; of half a character there is only U+FFFD."""
        return str(self._tokenizer.decode([token_id], skip_special_tokens=False))

    def _encode_text(self, text: str, shorter_than: int | None, *, add_special_tokens: bool) -> list[int]:
        if len(text) < LONG_CHARS:
            return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)
        least = self._bound.least_tokens(text)
        _check_length(least, shorter_than, got=f"{least} or more")
        (encoding,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return list(encoding.ids)

    def _render(self, prompt: Prompt) -> str:
        messages, template = prompt.messages or (), self._chat_tokenizer.chat_template
        if not template:
            raise InvalidRequestError("messages", len(messages), "this model has no chat template; send text")
        if not knows_tools(template) and (prompt.tools or any(message.tool_calls for message in messages)):
            names = [tool.name for tool in prompt.tools]
            raise InvalidRequestError("messages.tools", names, "this model's chat template does not know of tools")
        try:
            return str(
                self._chat_tokenizer.apply_chat_template(
                    [as_template_has_it(message) for message in messages],
                    tools=[tool_as_template_has_it(tool) for tool in prompt.tools] or None,
                    tokenize=False,
                    add_generation_prompt=not prompt.continues,
                    continue_final_message=prompt.continues,
                )
            )
        except (TemplateError, ValueError) as error:
            # Templates raise it themselves, for example for roles out of order.
            roles = [message.role for message in messages]
            raise InvalidRequestError("messages", roles, f"the model's chat template refuses them: {error}") from error


def check_ids(field: str, token_ids: Sequence[int], vocab_size: int, whose: str = "model") -> None:
    """Raises `InvalidRequestError` for what is no token of a prompt."""
    for index, token in enumerate(token_ids):
        if not 0 <= token < vocab_size:
            raise InvalidRequestError(
                f"{field}[{index}]", token, f"token ids of this {whose} are 0 to {vocab_size - 1}"
            )


def _check_length(least_tokens: int, shorter_than: int | None, *, got: object) -> None:
    if shorter_than is not None and least_tokens >= shorter_than:
        raise InvalidRequestError("prompt", got, f"the prompt must be shorter than {shorter_than} tokens")
