"""Grammars are compiled once, off the loop, within limits; and what cannot be is told by field, reason and place."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future

import pytest
from support.structured import EOS, tiny_text, tiny_vocabulary
from support.tiny_models import VOCAB_SIZE
from tokenizers import Tokenizer, models

from gralora_runtime.errors import DrainingError, InvalidRequestError
from gralora_runtime.request import StructuredOutput
from gralora_runtime.structured import compiler as module
from gralora_runtime.structured.compiler import Compiler
from gralora_runtime.structured.grammar import Wanted
from gralora_runtime.structured.matcher import Compiled
from gralora_runtime.structured.vocabulary import Vocabulary

A, B, C = (StructuredOutput(regex=letter) for letter in "abc")


@pytest.fixture
def compiler() -> Iterator[Compiler]:
    made = Compiler(fresh_vocabulary)
    yield made
    made.close()


def fresh_vocabulary() -> Vocabulary:
    return Vocabulary(tiny_text(), eos_token_ids=frozenset({EOS}), vocab_size=VOCAB_SIZE, num_threads=1)


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The sources whose compilation has begun, in order. One that is "slow" takes until `slow` is set."""
    sources: list[str] = []
    compile_ = module._compile

    def noted(wanted: Wanted, making: Future[Vocabulary]) -> Compiled | str:
        sources.append(wanted.source)
        if wanted.source == "slow":
            assert slow.wait(15)
        return compile_(wanted, making)

    monkeypatch.setattr(module, "_compile", noted)
    return sources


slow = threading.Event()


@pytest.fixture(autouse=True)
def nothing_stays_slow() -> Iterator[None]:
    slow.clear()
    yield
    slow.set()


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110  # of another thread: there is no event to wait for
        await asyncio.sleep(0.001)


async def test_who_asks_at_the_same_time_or_later_gets_what_was_compiled_once(compiler, begun) -> None:
    first, second = await asyncio.gather(compiler.compile(A), compiler.compile(StructuredOutput(regex="a")))
    third = await compiler.compile(A)

    assert first is second is third
    assert begun == ["a"]


async def test_what_cannot_be_compiled_is_tried_once_and_told_each_time(compiler, begun) -> None:
    """In errors of their own: one that is raised twice keeps both tracebacks."""
    found = await asyncio.gather(
        *[compiler.compile(StructuredOutput(regex="(")) for _ in range(3)], return_exceptions=True
    )

    assert begun == ["("]
    assert len({id(error) for error in found}) == 3
    assert {type(error) for error in found} == {InvalidRequestError}


async def test_the_oldest_is_forgotten_first(compiler, begun, monkeypatch) -> None:
    monkeypatch.setattr(module, "MAX_KEPT", 2)
    for output in (A, B, A, C, A, B):
        await compiler.compile(output)

    assert begun == ["a", "b", "c", "b"]


async def test_a_grammar_that_came_to_a_limit_is_compiled_anew(compiler, begun) -> None:
    """What its copies share has grown too large: all who come later would fail, too."""
    spent = await compiler.compile(A)
    spent.is_spent = True

    assert await compiler.compile(A) is not spent
    assert begun == ["a", "a"]


async def test_one_that_takes_long_is_given_up_and_another_does_not_wait_for_it(compiler, begun, monkeypatch) -> None:
    await compiler.compile(A)
    stuck = asyncio.ensure_future(compiler.compile(StructuredOutput(regex="slow")))
    await until(lambda: "slow" in begun)
    await compiler.compile(B)
    monkeypatch.setattr(module, "COMPILE_S", 0.01)

    with pytest.raises(InvalidRequestError, match=r"structured_output.regex: was not compiled within 0.01 s"):
        await compiler.compile(StructuredOutput(regex="slow"))
    slow.set()
    found = await stuck
    assert found is await compiler.compile(StructuredOutput(regex="slow"))
    assert begun == ["a", "slow", "b"]


async def test_a_client_that_leaves_takes_nothing_from_those_who_wait_for_the_same(compiler, begun) -> None:
    first, second = (asyncio.ensure_future(compiler.compile(StructuredOutput(regex="slow"))) for _ in range(2))
    await until(lambda: begun == ["slow"])
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    slow.set()

    assert isinstance(await second, Compiled)


async def test_at_the_end_nobody_is_left_in_line(begun, monkeypatch) -> None:
    monkeypatch.setattr(module, "NUM_THREADS", 1)
    compiler = Compiler(fresh_vocabulary)
    running = asyncio.ensure_future(compiler.compile(StructuredOutput(regex="slow")))
    waiting = asyncio.ensure_future(compiler.compile(A))
    await until(lambda: begun == ["slow"])
    compiler.close()
    with pytest.raises(DrainingError):
        await waiting
    with pytest.raises(DrainingError):
        await compiler.compile(B)
    slow.set()
    await running

    assert begun == ["slow"]


@pytest.mark.parametrize(
    ("output", "field", "problem"),
    [
        (StructuredOutput(json_schema="{"), "json_schema", "line 1 column 2"),
        (StructuredOutput(json_schema='{"type": "objekt"}'), "json_schema", "objekt"),
        (StructuredOutput(json_schema='{"$ref": "https://example.com/x"}'), "json_schema", "example.com"),
        (StructuredOutput(json_schema='{"type": "string", "pattern": "("}'), "json_schema", "regex"),
        (StructuredOutput(regex="a(b"), "regex", "unclosed"),
        (StructuredOutput(regex="(?=a)b"), "regex", "look"),
        (StructuredOutput(grammar="start: other"), "grammar", "other"),
        (StructuredOutput(grammar='begin: "a"'), "grammar", "start"),
        (StructuredOutput(grammar='start: "a'), "grammar", "1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_what_is_wrong_is_told_by_its_field_and_its_place(compiler, output, field, problem) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        await compiler.compile(output)

    assert caught.value.field == f"structured_output.{field}"
    assert problem in str(caught.value)
    assert len(str(caught.value)) < 800


@pytest.mark.parametrize(
    "output",
    [
        StructuredOutput(regex="((a{1,1000}){1,1000}){1,1000}b"),
        StructuredOutput(json_schema='{"type": "array", "minItems": 100000000, "items": {"type": "string"}}'),
        StructuredOutput(json_schema='{"properties": {"a": ' * 200 + "{}" + "}}" * 200),
        StructuredOutput(grammar="start: " + " | ".join(f"/[a-z]{{1,{i}}}b/" for i in range(1, 3000))),
    ],
    ids=["regex", "items", "deep", "rules"],
)
async def test_something_huge_is_refused_or_compiled_and_takes_no_long_time(compiler, output) -> None:
    """By the library's own limits, not by the time that is left."""
    [found] = await asyncio.gather(compiler.compile(output), return_exceptions=True)

    assert isinstance(found, Compiled | InvalidRequestError), found
    assert "was not compiled within" not in str(found)


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (
            lambda: Vocabulary(tiny_text(), eos_token_ids=frozenset(), vocab_size=VOCAB_SIZE, num_threads=1),
            "it has no end of sequence",
        ),
        (
            lambda: Vocabulary(
                Tokenizer(models.WordLevel({"a": 0}, "a")), eos_token_ids=frozenset({0}), vocab_size=1, num_threads=1
            ),
            "its tokenizer is of a kind that grammars cannot follow",
        ),
    ],
    ids=["no-end", "words"],
)
async def test_a_model_whose_tokens_cannot_be_followed_refuses_and_says_why(make, problem) -> None:
    compiler = Compiler(make)
    for _ in range(2):
        with pytest.raises(InvalidRequestError, match=problem):
            await compiler.compile(A)
    compiler.close()


def test_the_vocabulary_is_as_wide_as_the_models_logits() -> None:
    """Checkpoints are padded; and a tokenizer may have tokens for which there are no logits."""
    wide, narrow = (
        Vocabulary(tiny_text(), eos_token_ids=frozenset({EOS}), vocab_size=size, num_threads=1) for size in (1000, 10)
    )

    assert (wide.num_words, narrow.num_words) == (32, tiny_vocabulary().num_words)
    wide.close()
    narrow.close()
