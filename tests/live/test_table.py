"""A reader gets the page that was asked for, of the rows that were searched, in the order that was wanted."""

from __future__ import annotations

import pytest

from gralora_runtime.errors import InvalidRequestError
from gralora_server.live.table import ROWS, Asked, shown

COLUMNS = ("name", "size")
MANY = [{"name": f"n{number:04}", "size": number % 7 or None} for number in range(5000)]


def asked(**query: str) -> Asked:
    return Asked.read({f"t.{name}": value for name, value in query.items()}, "t", COLUMNS)


def names(**query: str) -> list[str]:
    return [row["name"] for row in shown(MANY, asked(**query), ("name",))["rows"]]


def test_a_page_has_so_many_rows_and_says_how_many_there_are() -> None:
    second = shown(MANY, asked(page="2"), ("name",))

    assert [row["name"] for row in second["rows"]] == [f"n{number:04}" for number in range(ROWS, 2 * ROWS)]
    assert (second["found"], second["page"], second["pages"]) == (5000, 2, 100)


def test_what_is_searched_is_found_in_any_case_and_everywhere_in_a_name() -> None:
    assert names(search="N499") == [f"n{number}" for number in range(4990, 5000)]
    assert names(search="nothing") == []


def test_what_is_unknown_is_the_least_and_equals_are_by_name() -> None:
    assert names(sort="size")[:2] == ["n0000", "n0007"]
    assert names(sort="size", order="descending")[:2] == ["n0006", "n0013"]


def test_behind_the_last_page_is_the_last_page() -> None:
    assert shown(MANY[:3], asked(page="9"), ("name",))["page"] == 1
    assert shown([], asked(), ("name",)) == {"rows": [], "found": 0, "page": 1, "pages": 1}


@pytest.mark.parametrize(
    ("name", "value"),
    [("sort", "secret"), ("order", "random"), ("page", "0"), ("page", "x"), ("page", "-1"), ("page", "9" * 5000)],
)
def test_what_cannot_be_meant_is_refused_by_its_name(name: str, value: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"t.{name}"):
        asked(**{name: value})
