"""Turns one request's token ids into text, piece by piece, and finds its stop strings. It knows no model and no engine.

The pieces add up to what decoding all output ids at once gives, with the prompt in front where the tokenizer needs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from tokenizers import Tokenizer

REPLACEMENT = "\ufffd"  # what decoders write for bytes that are no character, or not yet
MAX_CONTEXT_TOKENS = 32  # of the prompt
MAX_UNSETTLED_TOKENS = 16  # a character is at most 4 bytes: with this many tokens, some of them can be settled
MAX_CHARACTER_TOKENS = 4


@dataclass(frozen=True, slots=True)
class TextDelta:
    """Text that is now final. `stop_string` is the one that ended the text; it is not part of it."""

    text: str
    stop_string: str | None = None


class Detokenizer:
    """One request's text. A stop string counts only once `min_tokens` tokens exist, including the one just pushed."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        *,
        prompt_token_ids: Sequence[int] = (),
        min_tokens: int = 0,
        skip_special_tokens: bool = True,
    ) -> None:
        self._text = TextStream(tokenizer, prompt_token_ids, skip_special_tokens=skip_special_tokens)
        self._stops = StopScanner(stop)
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._stopped = False

    def push(self, token_id: int) -> TextDelta:
        """The text that became final with this token; after a stop string nothing may be pushed any more."""
        assert not self._stopped, "a token was pushed after the stop string"
        self._num_tokens += 1
        return self._scan(self._text.push(token_id))

    def push_all(self, token_ids: Sequence[int]) -> str:
        """The text that became final with these tokens, for requests without stop strings, at the price of one."""
        return self._text.push(*token_ids)

    def flush(self) -> str:
        """What was held back, at the end of a generation: a half character comes out as U+FFFD, as in a full decode.

        The end is already decided, so a stop string that only shows up here is cut off with what follows it, silently.
        """
        if self._stopped:
            return ""
        return self._scan(self._text.flush()).text + self._stops.flush()

    def _scan(self, text: str) -> TextDelta:
        delta = self._stops.feed(text, enabled=self._num_tokens >= self._min_tokens)
        self._stopped = delta.stop_string is not None
        return delta


class TextStream:
    """Token ids to text. Not `tokenizers.decoders.DecodeStream`: that has no flush, so a trailing half character would
    be lost; it raises where a byte-fallback decoder takes back a character; and it buffers skipped tokens for ever.

    The window is the tokens of the last settled piece, then those not settled yet. The former give a decoder that looks
    at its neighbours (a leading space, a run of byte tokens) what it looks at.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], *, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._window = self._prompt_context(prompt_token_ids)
        self._num_settled = len(self._window)
        self._settled_text = self._decode(self._window)

    def push(self, *token_ids: int) -> str:
        new = [token_id for token_id in token_ids if not self._is_skipped(token_id)]
        if not new:
            return ""
        self._window += new
        text = self._decode(self._window)
        if not text.endswith(REPLACEMENT):
            return self._settle(text)
        if len(self._window) - self._num_settled < MAX_UNSETTLED_TOKENS:
            return ""
        return self._settle_broken(text)

    def flush(self) -> str:
        return self._settle(self._decode(self._window))

    def _settle(self, text: str) -> str:
        """Everything in the window is final; the tokens just settled become the context of the next."""
        text = self._with_valid_context(text)
        piece = text[len(self._settled_text) :]
        self._window = self._window[self._num_settled :]
        self._num_settled = len(self._window)
        self._settled_text = self._decode(self._window)
        return piece

    def _settle_broken(self, text: str) -> str:
        """Bytes that form no character must not be held, and decoded again, for ever: answers all but the last few.

        Exact for byte-level tokenizers. A byte-fallback one that spells six or more literal U+FFFD in a row as byte
        tokens gets too many of them: until its last byte, such a run decodes like a broken one.
        """
        text = self._with_valid_context(text)
        head, tail = self._window[:-MAX_CHARACTER_TOKENS], self._window[-MAX_CHARACTER_TOKENS:]
        settled = self._decode(head)
        if settled + self._decode(tail) != text:
            return ""  # the cut is inside a character: try again after the next token
        piece = settled[len(self._settled_text) :]
        self._window, self._num_settled, self._settled_text = tail, 0, ""
        return piece

    def _with_valid_context(self, text: str) -> str:
        """The window's text, without the context if new tokens changed what the context spells.

        That happens with byte-fallback decoders, for which one broken byte breaks the whole run of byte tokens before
        it. What was sent cannot be taken back; the rest stands alone.
        """
        if text.startswith(self._settled_text):
            return text
        self._window = self._window[self._num_settled :]
        self._num_settled, self._settled_text = 0, ""
        return self._decode(self._window)

    def _prompt_context(self, prompt_token_ids: Sequence[int]) -> list[int]:
        """The end of the prompt: as short as it can be while it has text and starts and ends at a whole character."""
        for size in range(1, min(len(prompt_token_ids), MAX_CONTEXT_TOKENS) + 1):
            context = list(prompt_token_ids[-size:])
            text = self._decode(context)
            if text and REPLACEMENT not in text:
                return context
        return []  # half a character as context would do more harm than none, which at most costs a leading space

    def _is_skipped(self, token_id: int) -> bool:
        return _token_alone(self._tokenizer, token_id, self._skip_special_tokens) is None

    def _decode(self, token_ids: list[int]) -> str:
        if len(token_ids) == 1:  # every token is the context of the next: its text is wanted again and again
            return _token_alone(self._tokenizer, token_ids[0], self._skip_special_tokens) or ""
        return self._tokenizer.decode(token_ids, skip_special_tokens=self._skip_special_tokens)


@lru_cache(maxsize=1 << 18)
def _token_alone(tokenizer: Tokenizer, token_id: int, skip_special_tokens: bool) -> str | None:
    """What one token spells alone; None for a special token that is skipped, and for an id that the tokenizer does not
    have (vocabularies are padded)."""
    text: str = tokenizer.decode([token_id], skip_special_tokens=skip_special_tokens)
    if text:
        return text
    unknown = tokenizer.id_to_token(token_id) is None
    return None if unknown or tokenizer.decode([token_id], skip_special_tokens=False) != "" else ""


class StopScanner:
    """Text up to the first stop string. First is the one completed first, whatever pieces the text comes in; of several
    completed by the same character the longest. Only text that may still be the beginning of one is held back.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        assert all(stop), "an empty stop string"
        self._stop = tuple(stop)
        self._held = ""

    def feed(self, text: str, *, enabled: bool) -> TextDelta:
        num_seen = len(self._held)  # no match may end in here: it would have been found, or was not enabled
        text = self._held + text
        if enabled and (found := self._first_match(text, num_seen)):
            start, stop = found
            self._held = ""
            return TextDelta(text[:start], stop)
        start = min((_open_start(text, stop) for stop in self._stop), default=len(text))
        self._held = text[start:]
        return TextDelta(text[:start])

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held

    def _first_match(self, text: str, num_seen: int) -> tuple[int, str] | None:
        starts = ((text.find(stop, max(num_seen - len(stop) + 1, 0)), stop) for stop in self._stop)
        found = [(start + len(stop), start, stop) for start, stop in starts if start >= 0]
        return min(found)[1:] if found else None


def _open_start(text: str, stop: str) -> int:
    """Where the longest end of `text` that is a proper beginning of `stop` starts; `len(text)` if there is none."""
    start = text.find(stop[0], max(len(text) - len(stop) + 1, 0))
    while start >= 0 and not stop.startswith(text[start:]):
        start = text.find(stop[0], start + 1)
    return start if start >= 0 else len(text)
