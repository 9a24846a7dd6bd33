"""Where a key stands in a TOML text, however it is written there."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator

from hypothesis import given, settings
from hypothesis import strategies as st

from gralora_server.settings.lines import MAX_DEPTH, Keys, lines_of

TEXT = '''\
top = """
several
lines \\""" = 1
"""""  # ends with two quotes
"a.b" . c = 1
'lit eral' = \'\'\'
[not.a.header]
\'\'\'

[server]  # [comment]
address = "[x]#{}" # a comment with = and "
list = [
  "one",  # a comment ] in it
  [ 2, 3 ],
  { name = "four", deep = { er = 4 } },
]
[tenants.acme.limits]
streams = 2
[[tenants.acme.tokens]]
sha256 = '#'
when = 1979-05-27 07:32:00
[[tenants.acme.tokens]]
role = "x"
[tenants.acme.tokens.below]
inner = { a = 1, b = [ "}", 2 ] }
'''


def keys_of(value: object, above: Keys = ()) -> Iterator[Keys]:
    """Every key and every place in an array that a document has."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inner:
        yield (*above, key)
        yield from keys_of(one, (*above, key))


def test_each_key_is_found_on_its_line_and_no_other_is() -> None:
    lines = lines_of(TEXT)
    expected = {
        ("top",): 1,
        ("a.b", "c"): 5,
        ("lit eral",): 6,
        ("server",): 10,
        ("server", "address"): 11,
        ("server", "list"): 12,
        ("server", "list", 0): 13,
        ("server", "list", 1, 1): 14,
        ("server", "list", 2, "deep", "er"): 15,
        ("tenants", "acme"): 17,
        ("tenants", "acme", "limits", "streams"): 18,
        ("tenants", "acme", "tokens", 0, "when"): 21,
        ("tenants", "acme", "tokens", 1): 22,
        ("tenants", "acme", "tokens", 1, "role"): 23,
        ("tenants", "acme", "tokens", 1, "below", "inner", "b", 1): 25,
    }

    assert set(lines) == set(keys_of(tomllib.loads(TEXT)))
    assert {keys: lines[keys] for keys in expected} == expected


def test_windows_line_ends_count_once() -> None:
    assert lines_of("a = 1\r\n\r\nb = 2\r\n") == {("a",): 1, ("b",): 3}


def test_an_empty_text_has_no_keys() -> None:
    assert lines_of("# nothing\n") == {}


def test_keys_in_keys_are_told_apart_only_as_deep_as_anybody_looks() -> None:
    deep = lines_of("a" + ".a" * 5000 + " = 1\n")

    assert deep == {("a",) * length: 1 for length in range(1, MAX_DEPTH + 1)}


CHARACTERS = st.characters(exclude_categories=["Cc", "Cs"]) | st.sampled_from("#[]{}='\".,\n \\")
NAMES = st.text(CHARACTERS, min_size=1, max_size=6)
SCALARS = st.one_of(st.booleans(), st.integers(-9, 9), st.text(CHARACTERS, max_size=8))
INLINE = st.recursive(
    SCALARS,
    lambda below: st.one_of(st.lists(below, max_size=3), st.dictionaries(NAMES, below, max_size=3)),
    max_leaves=8,
)


def inline(value: object) -> str:
    """A value on one line."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{quoted(key)} = {inline(one)}" for key, one in value.items()) + " }"
    if isinstance(value, list):
        return "[ " + ", ".join(map(inline, value)) + " ]"
    return quoted(value)


def quoted(value: object) -> str:
    """JSON and TOML agree on texts, but not on how to escape what lies beyond 16 bits."""
    return json.dumps(value, ensure_ascii=False)


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(NAMES, st.lists(st.dictionaries(NAMES, INLINE, max_size=3), min_size=1, max_size=3), max_size=3))
def test_whatever_tomllib_reads_is_found_where_it_was_written(tables: dict[str, list[dict[str, object]]]) -> None:
    """Arrays of tables, each key on a line of its own: it is known on which."""
    rows, expected = [], {}
    for name, bodies in tables.items():
        for index, body in enumerate(bodies):
            rows.append(f"[[ {quoted(name)} ]]")
            expected[name, index] = len(rows)
            for key, value in body.items():
                rows.append(f"{quoted(key)} = {inline(value)}")
                expected[name, index, key] = len(rows)
    text = "\n".join(rows)
    lines = lines_of(text)

    assert set(lines) == set(keys_of(tomllib.loads(text)))
    assert {keys: lines[keys] for keys in expected} == expected
