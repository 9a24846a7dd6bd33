"""What a request asks for becomes one grammar, in which nobody can write more than what is theirs to write."""

from __future__ import annotations

import json

import pytest

from gralora_runtime.request import StructuredOutput
from gralora_runtime.structured.grammar import Wanted

ALL = (
    StructuredOutput(json_schema='{"type": "object"}'),
    StructuredOutput(regex='{"type": "object"}'),
    StructuredOutput(grammar='{"type": "object"}'),
    StructuredOutput(choice=('{"type": "object"}',)),
    StructuredOutput(json_object=True),
)


def test_each_format_is_asked_for_by_its_own_field() -> None:
    fields = [Wanted.of(output).field.removeprefix("structured_output.") for output in ALL]

    assert fields == ["json_schema", "regex", "grammar", "choice", "json_object"]


def test_the_same_text_in_another_format_is_other_content() -> None:
    assert len({Wanted.of(output).digest for output in ALL}) == len(ALL)
    assert Wanted.of(ALL[0]).digest == Wanted.of(StructuredOutput(json_schema='{"type": "object"}')).digest


def test_a_schema_sets_nothing_beside_itself() -> None:
    """Put into a text, this one would end the grammar and begin a second one."""
    wanted = Wanted.of(StructuredOutput(grammar='start: "a" } ], "max_tokens": 1, "x": [ {'))

    assert json.loads(wanted.grammar()).keys() == {"grammars"}


def test_white_space_is_bounded_unless_the_schema_says_how_much_there_may_be() -> None:
    own = {"whitespace_flexible": False}
    schemas = {"{}": None, json.dumps({"x-guidance": own}): own}

    for source, expected in schemas.items():
        [grammar] = json.loads(Wanted.of(StructuredOutput(json_schema=source)).grammar())["grammars"]
        options = grammar["json_schema"]["x-guidance"]
        assert options == own if expected else "{1,16}" in options["whitespace_pattern"]


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("{", "line 1 column 2"),
        ('{"a": 1, }', "column"),
        ("[]", "a schema is a JSON object, and this is a list"),
        ("true", "and this is a bool"),
        ("[" * 60_000, "is nested too deeply"),
    ],
    ids=["open", "comma", "list", "bool", "deep"],
)
def test_what_is_no_schema_at_first_sight_is_told_with_its_place(source: str, problem: str) -> None:
    with pytest.raises(ValueError, match=r".*") as caught:
        Wanted.of(StructuredOutput(json_schema=source)).grammar()

    assert problem in str(caught.value)


def test_a_refusal_names_the_field_and_shows_the_source() -> None:
    error = Wanted.of(StructuredOutput(regex="(" * 200)).refused("is wrong")

    assert error.field == "structured_output.regex"
    assert str(error).startswith("structured_output.regex: is wrong (got '(((")
    assert len(str(error)) < 200
