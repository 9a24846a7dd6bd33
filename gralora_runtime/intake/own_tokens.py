"""Tokenizers for adapters with tokens of their own: the base model's, with these behind. Kept while they are used."""

from __future__ import annotations

import threading
from collections import OrderedDict

from tokenizers import AddedToken, Tokenizer

from gralora_runtime.adapters.checkpoint.own_tokens import TOKENIZER_FILE, OwnToken
from gralora_runtime.model.loading import BaseModel
from gralora_runtime.model.tokenization import PromptTokenizer

MAX_KEPT = 8  # each takes as much memory as the base model's


class OwnTokenizers:
    """Thread-safe. By the tokens: adapters that have the same share one."""

    def __init__(self, base: BaseModel) -> None:
        self._base = base
        self._lock = threading.Lock()  # also while one is made: two at once would take the memory of two
        self._kept: OrderedDict[tuple[OwnToken, ...], tuple[Tokenizer, PromptTokenizer]] = OrderedDict()

    def find(self, tokens: tuple[OwnToken, ...]) -> tuple[Tokenizer, PromptTokenizer]:
        """Blocking: the first time it takes as long as reading the base model's tokenizer.

        Raises ValueError if they are no new tokens to it.
        """
        with self._lock:
            found = self._kept.pop(tokens, None) or self._made(tokens)
            self._kept[tokens] = found
            while len(self._kept) > MAX_KEPT:
                self._kept.popitem(last=False)
            return found

    def _made(self, tokens: tuple[OwnToken, ...]) -> tuple[Tokenizer, PromptTokenizer]:
        tokenizer = Tokenizer.from_str(self._base.tokenizer.to_str())
        first = tokenizer.get_vocab_size()
        for token in tokens:  # one by one: a special one is added by another method
            own = AddedToken(
                token.content,
                single_word=token.single_word,
                lstrip=token.lstrip,
                rstrip=token.rstrip,
                normalized=token.normalized,
                special=token.special,
            )
            (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([own])
        for at, token in enumerate(tokens, first):
            if tokenizer.token_to_id(token.content) != at:
                raise ValueError(f"{TOKENIZER_FILE}: its token {at} has a text that another token has")
        return tokenizer, PromptTokenizer(tokenizer, self._base.chat_tokenizer, self._base.model.config.vocab_size)
