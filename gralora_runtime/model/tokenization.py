"""Prompts to token ids: plain text, ids, or messages through the model's chat template. Knows no request."""

from __future__ import annotations

from typing import Any

from jinja2 import TemplateError
from tokenizers import Tokenizer

from gralora_runtime.errors import InvalidRequestError
from gralora_runtime.request import ChatMessage, Prompt


class PromptTokenizer:
    """Thread-safe: neither tokenizer is changed after construction."""

    def __init__(self, tokenizer: Tokenizer, chat_tokenizer: Any, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._chat_tokenizer = chat_tokenizer
        self._vocab_size = vocab_size
        tokenizer.no_truncation()  # a checkpoint may ask for it; a prompt is served whole or refused
        tokenizer.no_padding()

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt, at least one. Raises `InvalidRequestError` naming the field."""
        if prompt.token_ids is not None:
            field, ids = "token_ids", self._check_ids(prompt.token_ids)
        elif prompt.messages is not None:
            field, ids = "messages", self._encode_messages(prompt.messages)
        else:
            field, ids = "text", list(self._tokenizer.encode(prompt.text or "").ids)
        if not ids:
            raise InvalidRequestError(field, getattr(prompt, field), "the prompt is empty")
        return ids

    def _check_ids(self, token_ids: tuple[int, ...]) -> list[int]:
        for index, token in enumerate(token_ids):
            if not 0 <= token < self._vocab_size:
                problem = f"token ids of this model are 0 to {self._vocab_size - 1}"
                raise InvalidRequestError(f"token_ids[{index}]", token, problem)
        return list(token_ids)

    def _encode_messages(self, messages: tuple[ChatMessage, ...]) -> list[int]:
        if not self._chat_tokenizer.chat_template:
            raise InvalidRequestError("messages", len(messages), "this model has no chat template; send text")
        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            text = self._chat_tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:  # templates raise it themselves, for example for roles out of order
            roles = [message.role for message in messages]
            raise InvalidRequestError("messages", roles, f"the model's chat template refuses them: {error}") from error
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)
