"""The model's tokens as grammars read them: as bytes. And masks over them, many at once. Knows no request."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
from llguidance import LLExecutor, LLMatcher, LLTokenizer
from tokenizers import Tokenizer

from gralora_runtime.failure import contained

BITS = 32
Words = npt.NDArray[np.int32]  # [.., words]: bit i % 32 of word i // 32 says whether token i may be chosen


class Vocabulary:
    """Made once for a model, which takes up to a second."""

    def __init__(
        self, tokenizer: Tokenizer, *, eos_token_ids: frozenset[int], vocab_size: int, num_threads: int
    ) -> None:
        """`num_threads`: that fill masks. Raises ValueError if no answer of this model can be made to match."""
        if not eos_token_ids:
            raise ValueError("it has no end of sequence")
        self.eos_token_ids = eos_token_ids
        self._eos = min(eos_token_ids)  # the one that the library knows of
        size = max(vocab_size, tokenizer.get_vocab_size(with_added_tokens=True))
        try:
            self.library = LLTokenizer(tokenizer.to_str(), n_vocab=size, eos_token=self._eos)
        except BaseException as error:
            if not contained(error):  # a panic of the library's is no Exception
                raise
            raise ValueError(f"its tokenizer is of a kind that grammars cannot follow: {error}") from error
        self.num_words = -(-size // BITS)
        self._executor = LLExecutor(num_threads)
        self.beside = ThreadPoolExecutor(1, "gralora-masks")  # for what is to be filled beside a forward pass

    def words(self, token_ids: Iterable[int]) -> Words:
        """[words], of these tokens. Those that an adapter has added are in no grammar."""
        bits = np.zeros(self.num_words * BITS, np.uint8)
        bits[[token for token in token_ids if token < len(bits)]] = 1
        return np.packbits(bits, bitorder="little").view(np.int32)

    def allows_end(self, words: Words) -> bool:
        """Whether the answer may end, by the library's mask."""
        return bool(words[self._eos // BITS] >> (self._eos % BITS) & 1)

    def fill(self, matchers: Sequence[LLMatcher]) -> Words:
        """[matchers, words]: what each may go on with. Python's lock is free meanwhile."""
        words = np.zeros((len(matchers), self.num_words), np.int32)
        places = [(matcher, row) for row, matcher in enumerate(matchers)]
        self._executor.unsafe_compute_mask_ptr(places, words.ctypes.data, self.num_words * words.itemsize, len(words))
        return words

    def close(self) -> None:
        """No step runs any more."""
        self.beside.shutdown()


def as_bools(words: Words, vocab_size: int) -> npt.NDArray[np.bool_]:
    """[vocab_size], of one row of words: what is behind them may not be chosen."""
    return np.unpackbits(words.view(np.uint8), count=vocab_size, bitorder="little").view(np.bool_)
