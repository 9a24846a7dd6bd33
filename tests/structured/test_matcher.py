"""One answer on its way through what it has to match: what may come next, when it may end, and when it has to."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.structured import (
    BOOLEAN,
    COMPACT,
    EOS,
    NULL,
    SCHEMAS,
    an_object,
    answer,
    array,
    compiled,
    integer,
    matches,
    state_of,
    step,
    string,
    text_of,
    tiny_text,
    tiny_vocabulary,
)
from support.tiny_models import VOCAB_SIZE

from gralora_runtime.errors import InvalidRequestError
from gralora_runtime.request import SamplingParams, StoppingParams, StructuredOutput
from gralora_runtime.sampling.outcome import MatchingFailure, SampledToken, SamplingFailure
from gralora_runtime.structured.masks import begin, fill
from gralora_runtime.structured.matcher import Matcher
from gralora_runtime.structured.vocabulary import as_bools

GREEDY = SamplingParams(temperature=0.0)
ANY = StoppingParams()


def ids(text: str) -> list[int]:
    return list(tiny_text().encode(text).ids)


def after(output: StructuredOutput, text: str, stopping: StoppingParams = ANY) -> Matcher:
    """One that has come through this text, with its mask filled."""
    matcher = Matcher(compiled(output), stopping)
    for token_id in ids(text):
        matcher.advance(token_id)
    fill([matcher])
    return matcher


def allowed(matcher: Matcher) -> set[int]:
    assert matcher.mask is not None
    return set(np.flatnonzero(as_bools(matcher.mask, VOCAB_SIZE)).tolist())


def test_what_may_come_next_is_what_keeps_the_text_matching() -> None:
    """Each token alone, against Python's own regular expressions."""
    pattern = re.compile(r"(stop|the) [0-9]{1,2}")
    numbers = [f"{number:0{width}}" for width in (1, 2) for number in range(10**width)]
    whole = [f"{word} {number}" for word in ("stop", "the") for number in numbers]
    beginnings = {text[:length] for text in whole for length in range(len(text) + 1)}
    for text in ("", "s", "the", "the ", "stop 1"):
        matcher = after(StructuredOutput(regex=pattern.pattern), text)

        fitting = {i for i in range(3, VOCAB_SIZE) if (piece := tiny_text().decode([i])) and text + piece in beginnings}
        assert allowed(matcher) - {EOS} <= fitting
        assert allowed(matcher) - {EOS}, text
        assert (EOS in allowed(matcher)) == (pattern.fullmatch(text) is not None)


@pytest.mark.parametrize("schema", SCHEMAS, ids=range(len(SCHEMAS)))
def test_noise_becomes_json_that_the_schema_allows(schema: dict[str, object]) -> None:
    what = compiled(StructuredOutput(json_schema=json.dumps(schema)))

    texts = [text_of(answer(state_of(what, seed=seed), seed=seed)) for seed in range(8)]

    assert all(matches(json.loads(text), schema) for text in texts), texts
    assert len(set(texts)) > 1, "noise that says the same each time"


values = st.sampled_from([BOOLEAN, NULL, integer(0, 9), integer(-50, 1000), string(3), string(5, 2)]) | st.builds(
    lambda words: {"enum": words}, st.lists(st.text(min_size=1, max_size=5), min_size=1, max_size=4, unique=True)
)
names = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=6)


def _object(properties: dict[str, dict[str, object]], is_required: list[bool]) -> dict[str, object]:
    required = [name for name, wanted in zip(properties, is_required, strict=False) if wanted]
    return an_object(required, **properties)


schemas = st.recursive(
    values,
    lambda inner: (
        st.builds(array, inner, st.integers(0, 3))
        | st.builds(_object, st.dictionaries(names, inner, max_size=4), st.lists(st.booleans(), min_size=4, max_size=4))
        | st.builds(lambda some: {"anyOf": some}, st.lists(inner, min_size=1, max_size=3))
    ),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(schema=schemas, seed=st.integers(0, 1000), temperature=st.sampled_from([0.0, 0.7, 3.0]))
def test_any_schema_holds_whatever_the_logits_are(schema: dict[str, object], seed: int, temperature: float) -> None:
    state = state_of(
        compiled(StructuredOutput(json_schema=json.dumps(schema | COMPACT))),
        sampling=SamplingParams(temperature=temperature, top_k=seed % 3 * 7, frequency_penalty=seed % 2 * 0.5),
        seed=seed,
    )

    text = text_of(answer(state, seed=seed))

    assert matches(json.loads(text), schema), text


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(choices=st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=5, unique=True), seed=st.integers(0, 99))
def test_a_choice_is_one_of_its_texts_to_the_letter(choices: list[str], seed: int) -> None:
    """Also where one is the beginning of another, and where it looks like a pattern."""
    texts = (*choices, ".*|a{2}", choices[0] + "!")
    what = compiled(StructuredOutput(choice=texts))

    assert text_of(answer(state_of(what, seed=seed), seed=seed)) in texts


@pytest.mark.parametrize(
    ("output", "pattern"),
    [
        (StructuredOutput(regex=r"[a-f]{3}-\d{2}"), r"[a-f]{3}-\d{2}"),
        (
            StructuredOutput(grammar='start: pair (";" pair)?\npair: /[a-z]{2}/ "=" /[0-9]/'),
            r"[a-z]{2}=\d(;[a-z]{2}=\d)?",
        ),
        (StructuredOutput(grammar='start: "<" start ">" | "x"'), r"<{0,}x>{0,}"),
    ],
    ids=["regex", "grammar", "nested"],
)
def test_a_regular_expression_and_a_grammar_hold_too(output: StructuredOutput, pattern: str) -> None:
    texts = [text_of(answer(state_of(compiled(output), seed=seed), seed=seed)) for seed in range(10)]

    assert all(re.fullmatch(pattern, text) and text.count("<") == text.count(">") for text in texts), texts


def test_any_json_object_begins_and_ends_as_one() -> None:
    output = StructuredOutput(json_object=True)

    assert all(tiny_text().decode([i]).startswith("{") for i in allowed(after(output, "")))
    assert allowed(after(output, "{}")) == {EOS}
    assert EOS not in allowed(after(output, '{"a": [1'))


def test_the_end_of_sequence_is_possible_where_the_answer_may_end_and_only_there() -> None:
    output = StructuredOutput(regex="ab?c?")

    ends = [EOS in allowed(after(output, text)) for text in ("", "a", "ab", "abc")]

    assert ends == [False, True, True, True]


def test_every_end_of_sequence_and_stop_token_ends_it_and_who_ignores_the_former_goes_on() -> None:
    output = StructuredOutput(regex="[a-z]+")
    stop, plain = ids("!")[0], ids("x")[0]
    stopping = StoppingParams(stop_token_ids=(stop,))
    ignoring = StoppingParams(stop_token_ids=(stop,), ignore_eos=True)

    assert {stop, EOS, plain} <= allowed(after(output, "a", stopping))
    assert stop not in allowed(after(output, "", stopping))
    assert EOS not in allowed(after(output, "a", ignoring))
    assert stop in allowed(after(output, "a", ignoring))
    assert allowed(after(StructuredOutput(regex="(a|ab)"), "ab", ignoring)) == {stop, EOS}, "what else could end it"


def test_an_answer_is_complete_when_nothing_may_follow() -> None:
    matcher = Matcher(compiled(StructuredOutput(choice=("stop", "then"))), ANY)
    for token_id in ids("stop")[:-1]:
        matcher.advance(token_id)
        assert not matcher.is_complete
    matcher.advance(ids("stop")[-1])

    assert matcher.is_complete


def test_what_comes_behind_the_end_changes_nothing() -> None:
    """Steps are launched before it is known that a row has ended: it may have one too many on its way."""
    matcher = after(StructuredOutput(choice=("stop",)), "stop")
    for token_id in (*ids("then"), EOS):
        matcher.advance(token_id)
        fill([matcher])

    assert matcher.is_complete
    assert not matcher.library.is_error()


def test_no_bias_brings_a_token_that_would_break_it() -> None:
    [wanted], [other] = ids("a"), ids("b")
    state = state_of(
        compiled(StructuredOutput(regex="a")),
        sampling=SamplingParams(temperature=0.0, logit_bias={other: 100.0, wanted: -100.0}),
    )

    assert step(state, torch.zeros(1, VOCAB_SIZE)) == SampledToken(wanted, completes=True)


def test_below_min_tokens_an_answer_goes_on_if_it_can_and_ends_if_it_cannot() -> None:
    stopping = StoppingParams(min_tokens=9)
    state = state_of(compiled(StructuredOutput(regex="[xyz]{0,40}")), sampling=GREEDY, stopping=stopping)
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, EOS] = 50.0
    long = [step(state, logits) for _ in range(10)]

    assert [sampled.token_id == EOS for sampled in long if isinstance(sampled, SampledToken)] == [False] * 9 + [True]
    short = state_of(compiled(StructuredOutput(regex="(x|xy)")), sampling=GREEDY, stopping=stopping)
    tokens = answer(short)
    assert text_of(tokens) in ("x", "xy")
    assert len(tokens) < 9


def test_an_answer_that_may_be_empty_can_end_at_once() -> None:
    state = state_of(compiled(StructuredOutput(regex="(?:abc)?")), sampling=GREEDY)
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, EOS] = 1.0

    assert step(state, logits) == SampledToken(EOS, completes=True)


def test_a_token_that_does_not_fit_ends_the_request_by_its_field_and_spends_the_grammar() -> None:
    """As a limit of the library's does, that is met on the way."""
    what = compiled(StructuredOutput(regex="[a-c]{5}"))
    state = state_of(what)
    state.observe(ids("z")[0])

    failure = step(state, torch.zeros(1, VOCAB_SIZE))

    assert isinstance(failure, MatchingFailure)
    assert isinstance(failure.error, InvalidRequestError)
    assert failure.error.field == "structured_output.regex"
    assert "could not be followed to the end of the answer" in str(failure.error)
    assert what.is_spent


def test_where_nothing_that_fits_is_left_it_is_the_requests_fault_and_no_adapters() -> None:
    """Adapters whose requests fail for want of numbers are put into quarantine."""
    [letter] = ids("a")
    banned = state_of(
        compiled(StructuredOutput(regex="a[0-9]*")), stopping=StoppingParams(min_tokens=3, stop_token_ids=(letter,))
    )
    failure = step(banned, torch.zeros(1, VOCAB_SIZE))

    assert isinstance(failure, MatchingFailure)
    assert "none can be chosen" in str(failure.error)
    broken = step(state_of(compiled(StructuredOutput(regex="a"))), torch.full((1, VOCAB_SIZE), float("nan")))
    assert isinstance(broken, SamplingFailure)


def test_masks_of_many_are_those_of_each_here_and_beside() -> None:
    outputs = [StructuredOutput(json_schema=json.dumps(schema)) for schema in SCHEMAS]
    alone, together, beside = ([Matcher(compiled(output), ANY) for output in outputs] for _ in range(3))
    for matcher in alone:
        fill([matcher])
    fill(together)
    begin(beside)()
    begin([])()

    expected = [allowed(matcher) for matcher in alone]
    assert expected == [allowed(matcher) for matcher in together] == [allowed(matcher) for matcher in beside]


def test_copies_of_one_grammar_know_nothing_of_one_another() -> None:
    what = compiled(StructuredOutput(choice=("stop", "then")))
    first, second = Matcher(what, ANY), Matcher(what, ANY)
    first.advance(ids("stop")[0])
    fill([first, second])

    assert allowed(first) != allowed(second)
    assert {tiny_text().decode([i])[0] for i in allowed(second)} == {"s", "t"}


def test_tokens_and_their_words() -> None:
    vocabulary = tiny_vocabulary()
    wanted = {0, 31, 32, 63, 200, VOCAB_SIZE - 1}

    bits = as_bools(vocabulary.words(wanted), VOCAB_SIZE)

    assert set(np.flatnonzero(bits).tolist()) == wanted
    assert vocabulary.allows_end(vocabulary.words([EOS]))
    assert not vocabulary.allows_end(~vocabulary.words([EOS]))
