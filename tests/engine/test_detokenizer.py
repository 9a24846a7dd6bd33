"""Incremental text equals text decoded at once, and stop strings end it at the same character however it is cut up.

The tokenizers are built here: a trained byte-level BPE, and two as SentencePiece's, without and with byte tokens.
"""

import random

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from gralora_runtime.detokenizer import Detokenizer, StopScanner, TextDelta

MANY_REPLACEMENTS = "\ufffd" * 70  # characters of their own, not broken bytes
TEXTS = [
    "Hello, world! How are you today?",
    "  leading,   inner and trailing spaces  ",
    "def f(x):\n\treturn x ** 2  # square\r\n",
    "naïve café, Übergrößenträger, ñandú, ål",
    "Привет, как дела? Здравствуйте.",
    "你好，世界。今天天气很好。",
    "こんにちは世界、カタカナもあります",
    "안녕하세요 세계",
    "مرحبا بالعالم",
    "हिन्दी में नमस्ते",
    "👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪 👍🏽 emoji 😀😃",
    "a literal \ufffd and two \ufffd\ufffd at the end \ufffd\ufffd",
    MANY_REPLACEMENTS,
    "mixed 你a好b👩c\u0301 𝔘𝔫𝔦𝔠𝔬𝔡𝔢",
]
END = "<|end|>"


@pytest.fixture(scope="module")
def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS[:8], trainer)
    return tokenizer


@pytest.fixture(scope="module")
def metaspace() -> Tokenizer:
    words = ["<s>", "<unk>", "▁", "▁hello", "▁world", "▁a", "b", "▁▁"]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[], unk_token="<unk>"))
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens([AddedToken("<s>", special=True)])
    return tokenizer


@pytest.fixture(scope="module")
def byte_fallback() -> Tokenizer:
    """As Llama 2's: bytes are tokens of their own, and one leading space of the whole text is stripped."""
    words = [f"<0x{byte:02X}>" for byte in range(256)] + ["<unk>", "▁", "▁hello", "▁world", "a"]
    vocab = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def byte_symbols() -> dict[int, str]:
    """How a byte-level vocabulary writes each byte: printable ones as they are, the others from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


BYTE_SYMBOLS = byte_symbols()


def byte_tokens(tokenizer: Tokenizer, data: bytes) -> list[int]:
    return [tokenizer.token_to_id(BYTE_SYMBOLS[byte]) for byte in data]


def ids_of(tokenizer: Tokenizer, *words: str) -> list[int]:
    return [tokenizer.token_to_id(word) for word in words]


def pieces_of(detokenizer: Detokenizer, token_ids) -> list[str]:
    return [detokenizer.push(token_id).text for token_id in token_ids] + [detokenizer.flush()]


# --- tokens to text


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_in_handfuls_spell_what_they_spell_one_by_one(byte_level, text):
    rng = random.Random(text)
    for token_ids in (byte_level.encode(text).ids, byte_tokens(byte_level, text.encode())):
        for _ in range(5):
            detokenizer, left, pieces = Detokenizer(byte_level), list(token_ids), []
            while left:
                count = rng.randrange(1, 8)
                pieces.append(detokenizer.push_all(left[:count]))
                left = left[count:]
            pieces.append(detokenizer.flush())

            assert text == "".join(pieces)
            assert text.count("\ufffd") == sum(piece.count("\ufffd") for piece in pieces)


def test_handfuls_of_skipped_and_unknown_tokens_are_no_text(byte_level):
    end, beyond = byte_level.token_to_id(END), 10_000
    hello = byte_level.encode("Hello").ids
    detokenizer = Detokenizer(byte_level)

    assert detokenizer.push_all([end, beyond]) == ""
    assert detokenizer.push_all([end, *hello, beyond]) == "Hello"


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_add_up_to_the_text_and_hold_whole_characters(byte_level, text):
    trained = byte_level.encode(text).ids
    for token_ids in (trained, byte_tokens(byte_level, text.encode())):
        pieces = pieces_of(Detokenizer(byte_level), token_ids)

        assert text == "".join(pieces) == byte_level.decode(token_ids)
        assert text.count("\ufffd") == sum(piece.count("\ufffd") for piece in pieces)


def test_text_is_not_held_back_without_a_reason(byte_level):
    pieces = pieces_of(Detokenizer(byte_level), byte_tokens(byte_level, "a你b".encode()))

    assert pieces == ["a", "", "", "你", "b", ""]


def test_any_bytes_add_up_to_what_a_full_decode_gives(byte_level):
    rng = random.Random(0)
    # Mostly starts and ends of characters, in any order, with literal U+FFFD, skipped and unknown ids between them.
    alphabet = [*byte_tokens(byte_level, b"a \x80\xa0\xbd\xbf\xc3\xe4\xef\xf0\x9f\xff"), *ids_of(byte_level, END), 9999]
    for _ in range(300):
        palette = rng.sample(alphabet, rng.randint(1, 5))
        token_ids = rng.choices(palette, k=rng.randint(0, 90))

        assert byte_level.decode(token_ids) == "".join(pieces_of(Detokenizer(byte_level), token_ids))


@pytest.mark.parametrize("data", [b"\xe4", b"\xe4\xbd", b"ok \xf0\x9f\x91"])
def test_flush_gives_a_half_character_as_a_full_decode_does(byte_level, data):
    token_ids = byte_tokens(byte_level, data)
    detokenizer = Detokenizer(byte_level)

    assert data[:-1].decode(errors="ignore") == "".join(detokenizer.push(token_id).text for token_id in token_ids)
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.flush() == ""


@pytest.mark.parametrize("byte", [0x80, 0xE4, 0xFF], ids=hex)
def test_endless_broken_bytes_are_neither_held_for_ever_nor_decoded_ever_longer(byte_level, byte):
    token_ids = byte_tokens(byte_level, bytes([byte]) * 200)
    detokenizer = Detokenizer(byte_level)
    num_sent = 0
    for num_pushed, token_id in enumerate(token_ids, start=1):
        num_sent += len(detokenizer.push(token_id).text)

        assert num_pushed - num_sent <= 16
        assert len(detokenizer._text._window) <= 32
    assert len(byte_level.decode(token_ids)) == num_sent + len(detokenizer.flush())


def test_special_tokens_give_no_text_unless_asked_for(byte_level):
    token_ids = [*byte_tokens(byte_level, b"a"), *ids_of(byte_level, END), *byte_tokens(byte_level, b"b")]

    assert pieces_of(Detokenizer(byte_level), token_ids) == ["a", "", "b", ""]
    assert pieces_of(Detokenizer(byte_level, skip_special_tokens=False), token_ids) == ["a", END, "b", ""]


def test_a_special_token_inside_a_character_does_not_break_it(byte_level):
    first, second, third = byte_tokens(byte_level, "你".encode())

    assert pieces_of(Detokenizer(byte_level), [first, *ids_of(byte_level, END), second, third])[-2] == "你"


def test_the_first_word_keeps_its_space_after_a_prompt(metaspace, byte_fallback):
    for tokenizer in (metaspace, byte_fallback):
        hello, world = ids_of(tokenizer, "▁hello", "▁world")

        assert pieces_of(Detokenizer(tokenizer), [hello, world]) == ["hello", " world", ""]
        assert pieces_of(Detokenizer(tokenizer, prompt_token_ids=[hello]), [world, hello]) == [" world", " hello", ""]


def test_skipped_tokens_do_not_push_the_context_out(metaspace):
    special, hello, world = ids_of(metaspace, "<s>", "▁hello", "▁world")
    prompt = [hello] + [special] * 20

    assert "".join(pieces_of(Detokenizer(metaspace, prompt_token_ids=prompt), [world])) == " world"
    assert "".join(pieces_of(Detokenizer(metaspace), [hello] + [special, 9999] * 50 + [world])) == "hello world"


@pytest.mark.parametrize("seed", range(20))
def test_words_and_spaces_in_any_order_add_up_to_a_full_decode(metaspace, byte_fallback, seed):
    rng = random.Random(seed)
    for tokenizer, words in ((metaspace, ["▁", "▁hello", "b", "▁▁", "<s>"]), (byte_fallback, ["▁", "▁hello", "a"])):
        token_ids = rng.choices(ids_of(tokenizer, *words), k=12)
        prompt = ids_of(tokenizer, "▁hello")
        text = "".join(pieces_of(Detokenizer(tokenizer, prompt_token_ids=prompt), token_ids))

        assert tokenizer.decode(prompt + token_ids) == tokenizer.decode(prompt) + text


@pytest.mark.parametrize("text", [text for text in TEXTS if text != MANY_REPLACEMENTS])
def test_byte_tokens_of_whole_characters_add_up(byte_fallback, text):
    token_ids = [byte_fallback.token_to_id(f"<0x{byte:02X}>") for byte in text.encode()]
    for prompt in ([], token_ids):  # a prompt of bytes: the context must not start inside a character
        pieces = pieces_of(Detokenizer(byte_fallback, prompt_token_ids=prompt), token_ids)

        assert text.lstrip(" ") == "".join(pieces).lstrip(" ")
        assert text.count("\ufffd") == sum(piece.count("\ufffd") for piece in pieces)


def test_a_broken_byte_after_sent_byte_tokens_costs_only_itself(byte_fallback):
    """A full decode turns the whole run into U+FFFD, including the character that the client already has."""
    token_ids = [byte_fallback.token_to_id(f"<0x{byte:02X}>") for byte in "你".encode() + b"\xe5"]
    token_ids += ids_of(byte_fallback, "a")

    assert byte_fallback.decode(token_ids) == "\ufffd\ufffd\ufffd\ufffda"
    assert "".join(pieces_of(Detokenizer(byte_fallback), token_ids)) == "你\ufffda"


def test_a_prompt_that_ends_inside_a_character_leaves_the_output_readable(byte_level):
    prompt = byte_tokens(byte_level, b"x\xe4")
    token_ids = byte_tokens(byte_level, b"\xbd\xa0 yes")

    assert "".join(pieces_of(Detokenizer(byte_level, prompt_token_ids=prompt), token_ids)) == "\ufffd\ufffd yes"


# --- stop strings


def feed_all(stop, pieces, *, enabled_from=0) -> tuple[str, str | None]:
    scanner = StopScanner(stop)
    text = ""
    for index, piece in enumerate(pieces):
        delta = scanner.feed(piece, enabled=index >= enabled_from)
        text += delta.text
        if delta.stop_string is not None:
            return text, delta.stop_string
    return text + scanner.flush(), None


def cut_naively(text: str, stop) -> tuple[str, str | None]:
    """The rule, spelled out: read on until some stop string is complete; of several then complete, take the longest."""
    for end in range(1, len(text) + 1):
        complete = [word for word in stop if text[:end].endswith(word)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, None


def random_cuts(rng: random.Random, text: str) -> list[str]:
    cuts = sorted(rng.choices(range(len(text) + 1), k=rng.randint(0, 8)))
    return [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]


@pytest.mark.parametrize("seed", range(50))
def test_stop_strings_cut_at_the_same_place_however_the_text_is_split(seed):
    rng = random.Random(seed)
    for _ in range(40):
        stop = ["".join(rng.choices("ab", k=rng.randint(1, 6))) for _ in range(rng.randint(0, 4))]
        text = "".join(rng.choices("abc", weights=(4, 4, 1), k=rng.randint(0, 30)))

        assert cut_naively(text, stop) == feed_all(stop, random_cuts(rng, text))


@pytest.mark.parametrize("seed", range(20))
def test_only_what_may_begin_a_stop_string_is_held_back(seed):
    rng = random.Random(seed)
    stop = ["".join(rng.choices("ab", k=rng.randint(2, 6))) for _ in range(3)]
    scanner = StopScanner(stop)
    read = sent = ""
    for piece in random_cuts(rng, "".join(rng.choices("abc", k=40))):
        delta = scanner.feed(piece, enabled=True)
        if delta.stop_string is not None:
            break
        read, sent = read + piece, sent + delta.text
        beginnings = {word[:length] for word in stop for length in range(1, len(word))}
        longest = max((start for start in beginnings if read.endswith(start)), key=len, default="")

        assert read == sent + longest


def test_the_stop_string_completed_first_wins_and_of_equals_the_longest():
    assert feed_all(["later", "late"], ["a later b"]) == ("a ", "late")
    assert feed_all(["bc", "abcd"], ["xabcd"]) == ("xa", "bc")
    assert feed_all(["c", "abc", "bc"], ["xabc"]) == ("x", "abc")


def test_a_false_start_is_released_with_the_character_that_ends_it():
    scanner = StopScanner(["\n\nUser:"])

    fed = [scanner.feed(piece, enabled=True).text for piece in ("Hi\n", "\nUs", "ed")]

    assert fed == ["Hi", "", "\n\nUsed"]


def test_stop_strings_across_tokens_end_the_text_before_them(byte_level):
    detokenizer = Detokenizer(byte_level, ["END", "你好"])
    deltas = [detokenizer.push(token_id) for token_id in byte_tokens(byte_level, "a你你好".encode())]

    assert TextDelta("", "你好") == deltas[-1]
    assert "".join(delta.text for delta in deltas) == "a你"
    assert detokenizer.flush() == ""


def test_nothing_may_be_pushed_after_a_stop_string(byte_level):
    [token_id] = byte_tokens(byte_level, b"x")
    detokenizer = Detokenizer(byte_level, ["x"])
    detokenizer.push(token_id)

    with pytest.raises(AssertionError, match="after the stop string"):
        detokenizer.push(token_id)


def test_flush_releases_the_beginning_of_a_stop_string(byte_level):
    detokenizer = Detokenizer(byte_level, ["END"])

    assert "".join(detokenizer.push(token_id).text for token_id in byte_tokens(byte_level, b"the EN")) == "the "
    assert detokenizer.flush() == "EN"


def test_flush_does_not_let_a_stop_string_out():
    """One token may hold a stop string and half a character: its text is only final at the end."""
    tokenizer = Tokenizer(models.BPE(vocab={f"ab{BYTE_SYMBOLS[0xE4]}": 0}, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()

    assert pieces_of(Detokenizer(tokenizer), [0]) == ["", "ab\ufffd"]
    assert pieces_of(Detokenizer(tokenizer, ["b"]), [0]) == ["", "a"]


@pytest.mark.parametrize(
    ("min_tokens", "expected"), [(0, ("", 1)), (1, ("", 1)), (2, ("x", 2)), (3, ("xx", 3)), (9, ("xxxx", None))]
)
def test_stop_strings_count_from_the_min_tokens_th_token_on(byte_level, min_tokens, expected):
    detokenizer = Detokenizer(byte_level, ["x"], min_tokens=min_tokens)
    text, stopped_at = "", None
    for number, token_id in enumerate(byte_tokens(byte_level, b"xxxx"), start=1):
        delta = detokenizer.push(token_id)
        text += delta.text
        if delta.stop_string is not None:
            stopped_at = number
            break

    assert expected == (text, stopped_at)


def test_tokens_without_text_count_towards_min_tokens(byte_level):
    detokenizer = Detokenizer(byte_level, ["x"], min_tokens=3)
    [end, x] = [*ids_of(byte_level, END), *byte_tokens(byte_level, b"x")]

    assert [detokenizer.push(token_id).stop_string for token_id in (end, end, x)] == [None, None, "x"]


def test_a_stop_string_that_began_before_min_tokens_counts_when_it_is_completed_after():
    assert feed_all(["STOP"], ["a ST", "OP b"], enabled_from=1) == ("a ", "STOP")
    assert feed_all(["STOP"], ["a STOP", " b STOP"], enabled_from=1) == ("a STOP b ", "STOP")
    # "bc" was complete too early; that it is still held back as a beginning of "abcd" does not make it count.
    assert feed_all(["abcd", "bc"], ["abc", "x"], enabled_from=1) == ("abcx", None)
