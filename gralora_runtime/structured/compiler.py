"""Compiles what answers have to match, beside the event loop, and keeps it. All state belongs to the loop's thread."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from llguidance import LLMatcher, LLParserLimits

from gralora_runtime.errors import DrainingError
from gralora_runtime.request import StructuredOutput
from gralora_runtime.structured.grammar import Wanted
from gralora_runtime.structured.matcher import Compiled, shown
from gralora_runtime.structured.vocabulary import Vocabulary

COMPILE_S = 10.0  # the library's own limits end most of what is too large in tenths of a second
NUM_THREADS = 2  # one that compiles something large is no reason for others to wait
MAX_KEPT = 64
# A state of a lexer takes one or two kilobytes, and they stay with what is kept. Errors go to clients, and need not
# repeat the grammar.
LIMITS = LLParserLimits(max_lexer_states=20_000, verbose_errors=False)


class Compiler:
    """What is asked for again is compiled once, also while that is under way. So is what cannot be compiled."""

    def __init__(self, make_vocabulary: Callable[[], Vocabulary]) -> None:
        """`make_vocabulary` keeps Python's lock while it works: so it does now, when nobody is served yet."""
        self._kept: OrderedDict[bytes, Future[Compiled | str]] = OrderedDict()  # by digest; the newest is the last
        self._closed = False
        self._threads = ThreadPoolExecutor(NUM_THREADS, "gralora-grammars")
        self._vocabulary = self._threads.submit(make_vocabulary)

    async def compile(self, output: StructuredOutput) -> Compiled:
        """Raises `InvalidRequestError`, and `DrainingError` if it is closed first."""
        wanted = Wanted.of(output)
        future = self._future_of(wanted)
        try:
            compiled = await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(future)), COMPILE_S)
        except TimeoutError:
            raise wanted.refused(f"was not compiled within {COMPILE_S:g} s") from None
        except asyncio.CancelledError:
            if self._closed and future.cancelled():
                raise DrainingError from None  # it was not the caller who gave up
            raise
        if isinstance(compiled, str):
            raise wanted.refused(compiled)
        return compiled

    def close(self) -> None:
        """Nobody waits any more, and no step runs."""
        self._closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        if not self._vocabulary.cancelled():
            self._vocabulary.add_done_callback(_close)

    def _future_of(self, wanted: Wanted) -> Future[Compiled | str]:
        if self._closed:
            raise DrainingError
        digest = wanted.digest
        future = self._kept.pop(digest, None)
        if future is None or _is_lost(future):
            future = self._threads.submit(_compile, wanted, self._vocabulary)
        self._kept[digest] = future
        while len(self._kept) > MAX_KEPT:
            self._kept.popitem(last=False)
        return future


def _compile(wanted: Wanted, making: Future[Vocabulary]) -> Compiled | str:
    """Or why it cannot be compiled."""
    try:
        vocabulary = making.result()
    except ValueError as error:
        return f"this model's answers cannot be made to match anything: {error}"
    try:
        grammar = wanted.grammar()
    except ValueError as error:
        return str(error)
    template = LLMatcher(vocabulary.library, grammar, log_level=0, limits=LIMITS)
    first = template.deep_copy()
    vocabulary.fill([first])  # the first mask takes longest, and may show that nothing can be matched
    for matcher in (template, first):
        if matcher.is_error():
            return f"cannot be compiled: {shown(matcher)}"
    return Compiled(wanted, vocabulary, template)


def _is_lost(future: Future[Compiled | str]) -> bool:
    """It has nothing that a new request could use."""
    if not future.done():
        return False
    if future.cancelled() or future.exception() is not None:
        return True
    found = future.result()
    return isinstance(found, Compiled) and found.is_spent


def _close(made: Future[Vocabulary]) -> None:
    if made.exception() is None:
        made.result().close()
