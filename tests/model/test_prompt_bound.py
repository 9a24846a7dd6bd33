"""A text of so many bytes that it cannot fit is refused before it is tokenized, and one that could fit never is."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.tiny_models import tiny_tokenizer
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from gralora_runtime.errors import InvalidRequestError
from gralora_runtime.model.prompt_bound import NFC_SHRINKS, prompt_bound
from gralora_runtime.model.tokenization import LONG_CHARS, PromptTokenizer, is_long
from gralora_runtime.request import ChatMessage, Prompt

TEXTS = ["the quick brown fox jumps over the lazy dog", "café, naïve; 한국어 テキスト", "=" * 40, " " * 40]


def byte_level(normalizer: normalizers.Normalizer | None = None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    )
    return tokenizer


def of_few_bytes() -> Tokenizer:
    """Knows the bytes of its training alone, and drops the others."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(TEXTS[:1], trainers.BpeTrainer(vocab_size=60, show_progress=False))
    return tokenizer


def with_spaces_marked() -> Tokenizer:
    """As Llama 2's and Gemma's: characters, with bytes to fall back on, and a mark in the place of each space."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    words = ["▁", "t", "h", "e", "▁t", "he", "▁the", "▁▁", "▁▁▁▁", "é"]
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "▁"), ("▁▁", "▁▁")]
    vocabulary = {word: index for index, word in enumerate([*bytes_, *words])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return tokenizer


def with_greedy_token() -> Tokenizer:
    """As Phi-3's, whose marks of a turn take the white space behind them."""
    tokenizer = with_spaces_marked()
    tokenizer.add_special_tokens([AddedToken("<|end|>", rstrip=True), AddedToken("<|user|>", lstrip=True)])
    return tokenizer


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "byte-level": byte_level,
    "composing": lambda: byte_level(normalizers.NFC()),
    "of-few-bytes": of_few_bytes,
    "spaces-marked": with_spaces_marked,
    "greedy-token": with_greedy_token,
    "tiny-model's": lambda: Tokenizer.from_str(tiny_tokenizer().backend_tokenizer.to_str()),
}
MADE = {name: make() for name, make in TOKENIZERS.items()}
BOUNDS = {name: prompt_bound(tokenizer) for name, tokenizer in MADE.items()}
PIECES = [
    *TEXTS,
    "the ",
    "  ",
    "\n\t",
    "<|end|>",
    "<|user|>",
    "<|start|>",
    "é",
    "e\u0301",
    "\u212a",
    "\u1112\u1161\u11ab",
]


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=8)), max_size=30).map("".join))
def test_no_text_is_fewer_tokens_than_its_bytes_say(name: str, text: str) -> None:
    assert BOUNDS[name].least_tokens(text) <= len(MADE[name].encode(text, add_special_tokens=False).ids)


@pytest.mark.parametrize("name", [name for name in TOKENIZERS if name != "of-few-bytes"])
def test_a_long_text_is_known_to_be_long(name: str) -> None:
    """The property above holds of a bound that is always 0, too."""
    text = "thee" * 10_000
    assert BOUNDS[name].least_tokens(text) >= len(text) / 45


def test_what_a_tokenizer_drops_or_swallows_counts_for_nothing() -> None:
    assert BOUNDS["of-few-bytes"].least_tokens("XYZ" * 1000) == 0
    assert BOUNDS["greedy-token"].least_tokens(" \n" * 1000) == 0
    assert BOUNDS["spaces-marked"].least_tokens(" \n" * 1000) >= 500


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": normalizers.Lowercase()},
        {"normalizer": normalizers.Replace(Regex(" +"), " ")},
        {"normalizer": normalizers.Sequence([normalizers.NFC(), normalizers.Replace(" ", "▁")])},
        {"pre_tokenizer": pre_tokenizers.Whitespace()},
        {"pre_tokenizer": pre_tokenizers.Split(" ", "removed")},
        {"model": models.WordLevel({"<unk>": 0}, unk_token="<unk>")},
        {"model": models.BPE({"a": 0}, [], unk_token="a", fuse_unk=True)},
    ],
    ids=lambda change: type(next(iter(change.values()))).__name__,
)
def test_of_a_tokenizer_that_may_shorten_a_text_in_other_ways_nothing_is_said(change: dict[str, object]) -> None:
    tokenizer = with_spaces_marked()
    for name, value in change.items():
        setattr(tokenizer, name, value)

    assert prompt_bound(tokenizer).least_tokens("long text " * 10_000) == 0


def test_composing_shortens_no_text_more_than_that() -> None:
    """Of every character that may be the result: the longest of what becomes each part of it."""
    sources: dict[str, int] = {}
    characters = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    for character in characters:
        parts = unicodedata.normalize("NFD", character)
        if len(parts) == 1:
            sources[parts] = max(sources.get(parts, 0), len(character.encode()))
    shrinks = [
        sum(sources[part] for part in unicodedata.normalize("NFD", character)) / len(character.encode())
        for character in characters
        if unicodedata.normalize("NFC", character) == character
    ]

    assert max(shrinks) == NFC_SHRINKS


@pytest.fixture
def prompts(monkeypatch: pytest.MonkeyPatch) -> PromptTokenizer:
    fast = tiny_tokenizer()
    return PromptTokenizer(Tokenizer.from_str(fast.backend_tokenizer.to_str()), fast, 320)


LONG = "the quick " * LONG_CHARS


@pytest.mark.parametrize(
    "prompt",
    [
        Prompt(text=LONG),
        Prompt(messages=(ChatMessage("user", LONG),)),
        Prompt(token_ids=(5,) * 100),
    ],
    ids=["text", "messages", "token_ids"],
)
def test_a_prompt_that_cannot_fit_is_refused_before_it_is_tokenized(
    prompts: PromptTokenizer, prompt: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompts, "_tokenizer", None)  # would fail

    with pytest.raises(InvalidRequestError, match=r"prompt: the prompt must be shorter than 100 tokens \(got "):
        prompts.encode(prompt, shorter_than=100)


def test_a_long_text_gets_the_same_ids_as_its_short_parts(prompts: PromptTokenizer) -> None:
    """Long ones are tokenized by another call of the library, which does not stop Python meanwhile."""
    part = "the lazy dog\n" * 100
    assert is_long(Prompt(text=part * 20))
    assert not is_long(Prompt(text=part))

    ids = prompts.encode(Prompt(text=part * 20), shorter_than=1 << 20)

    assert ids == prompts.encode(Prompt(text=part)) * 20
