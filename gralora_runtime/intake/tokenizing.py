"""Prompts to token ids beside the event loop: short ones at once, long ones one after the other. What is ids already
needs no thread."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from gralora_runtime.errors import DrainingError
from gralora_runtime.model.tokenization import PromptTokenizer, is_long
from gralora_runtime.request import Prompt

IDS_AT_ONCE = 2000  # to look at so many takes 50 us (AMD EPYC); to have a thread do it, 90


class Tokenizing:
    """A long prompt wants many times its size in memory, and a core for as long as it takes: ten at once would take
    all there is. They have one thread, and whoever leaves the line before its turn costs nothing.
    """

    def __init__(self, prompts: PromptTokenizer) -> None:
        self._prompts = prompts
        self._closed = False
        self._long = ThreadPoolExecutor(max_workers=1, thread_name_prefix="gralora-long-prompt")

    async def encode(
        self,
        prompt: Prompt,
        *,
        shorter_than: int | None = None,
        added_tokens: int = 0,
        prompts: PromptTokenizer | None = None,
    ) -> list[int]:
        """See `PromptTokenizer.encode`. `prompts`: another tokenizer. Raises `DrainingError` if it is closed first."""
        work = partial((prompts or self._prompts).encode, prompt, shorter_than=shorter_than, added_tokens=added_tokens)
        if prompt.token_ids is not None and len(prompt.token_ids) <= IDS_AT_ONCE:
            return work()
        if not is_long(prompt):
            return await asyncio.to_thread(work)
        try:
            future = self._long.submit(work)
        except RuntimeError as cause:  # closed
            raise DrainingError from cause
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            if self._closed and future.cancelled():
                raise DrainingError from None  # it was not the caller who gave up
            raise

    def text_of(self, token_id: int) -> str:
        """See `PromptTokenizer.text_of`."""
        return self._prompts.text_of(token_id)

    def close(self) -> None:
        """Nobody stands in line any more."""
        self._closed = True
        self._long.shutdown(wait=False, cancel_futures=True)
