"""How far one answer has come in what it has to match, and what it may go on with. Knows no logits.

It follows from the tokens of the answer alone. Of its methods one runs at a time, on whatever thread.
"""

from __future__ import annotations

from dataclasses import dataclass

from llguidance import LLMatcher

from gralora_runtime.errors import InvalidRequestError
from gralora_runtime.request import StoppingParams
from gralora_runtime.structured.grammar import Wanted
from gralora_runtime.structured.vocabulary import Vocabulary, Words

MAX_PROBLEM_CHARS = 500


@dataclass(slots=True, eq=False)
class Compiled:
    """A grammar as every answer that has to match it begins with it."""

    wanted: Wanted
    vocabulary: Vocabulary
    template: LLMatcher
    is_spent: bool = False  # it came to a limit of the library's; what copies learn they share, so others would, too


class Matcher:
    """Of one request."""

    def __init__(self, compiled: Compiled, stopping: StoppingParams) -> None:
        vocabulary = compiled.vocabulary
        self.vocabulary = vocabulary
        self.library = compiled.template.deep_copy()
        self.is_complete = False  # nothing may follow
        self.must_end = False  # with the next token, by `mask`
        self.mask: Words | None = None  # [words], of the token that comes next, once it is filled
        self._compiled = compiled
        self._problem: str | None = None
        self._ends = vocabulary.eos_token_ids.union(stopping.stop_token_ids)
        self._no_eos = ~vocabulary.words(vocabulary.eos_token_ids)
        self._last_words = vocabulary.words(self._ends)
        # Who ignores the end of sequence goes on as long as there is anything to go on with.
        self._end_words = vocabulary.words(stopping.stop_token_ids) if stopping.ignore_eos else self._last_words

    def take(self, words: Words) -> None:
        """The library's mask, which is written over, becomes this request's: with all that may end it."""
        if self._problem is None and self.library.is_error():
            self._fail()
        if self._problem is not None:
            words[:] = 0
        may_end = self.vocabulary.allows_end(words)
        words &= self._no_eos
        self.must_end = may_end and not words.any()
        if may_end:
            words |= self._last_words if self.must_end else self._end_words
        self.mask = words

    def advance(self, token_id: int) -> None:
        """A token was chosen. Behind the end nothing counts: a row may have been on its way."""
        self.mask = None
        if self.is_complete or self._problem is not None:
            return
        if token_id in self._ends:
            self.is_complete = True
        elif not self.library.consume_token(token_id):
            self._fail()
        else:
            self.is_complete = self.library.is_stopped()

    def refusal(self) -> InvalidRequestError:
        """Why no token can be chosen."""
        banned = "of the tokens that may come next none can be chosen: they are banned, or have no finite score"
        return self._compiled.wanted.refused(self._problem or banned)

    def _fail(self) -> None:
        self._problem = f"could not be followed to the end of the answer: {shown(self.library)}"
        self._compiled.is_spent = True


def shown(library: LLMatcher) -> str:
    """What the library has to say of its failure."""
    return str(library.get_error())[:MAX_PROBLEM_CHARS]
