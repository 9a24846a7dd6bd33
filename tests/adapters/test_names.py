"""Names and paths that a stranger sends."""

from __future__ import annotations

from pathlib import Path

import pytest

from gralora_runtime.adapters.catalogue.names import (
    Reference,
    account_of,
    as_float32,
    check_name,
    is_mix,
    parse_reference,
    split_revision,
    summed,
    unweighted,
)
from gralora_runtime.adapters.checkpoint.containment import resolve_inside
from gralora_runtime.errors import InvalidRequestError

NAMES = ["a", "A-1", "x.y_z", "0", "a" * 128, "org/a", "org/a@main", "a@v1.2", "a@0f3c", f"a@{'1' * 40}"]
NO_NAMES = [
    "", ".", "..", "../x", "/etc", "a/", "/a", "a/b/c", "a/../b", "a/.b", "a\\b", ".hidden", "-x", "_x", "a b", "a\0b",
    "a\n", "a@main\n", "ä", "a" * 129, "a%2f", "a@", "a@b@c", "a@3", "org/a@3", "@main", "a@sha256:0123456789ab",
    "a@../x",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_ordinary_names_pass(name: str) -> None:
    check_name("adapter", name)


@pytest.mark.parametrize("name", NO_NAMES, ids=repr)
def test_names_that_could_be_more_than_a_name_are_refused(name: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        check_name("adapter", name)

    assert caught.value.field == "adapter"


@pytest.mark.parametrize("name", NAMES)
def test_a_version_can_be_asked_for_behind_every_name(name: str) -> None:
    assert Reference(name=name) == parse_reference("adapter", name)
    assert Reference(name=name, number=12) == parse_reference("adapter", f"{name}@12")
    assert Reference(name=name, digest="0123456789ab") == parse_reference("adapter", f"{name}@sha256:0123456789ab")


@pytest.mark.parametrize(
    "text",
    ["a@sha256:0123456789a", f"a@sha256:{'0' * 65}", "a@sha256:0123456789AB", "a@sha256:", "a@-1", "a@1@2", "@1"],
)
def test_a_version_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequestError):
        parse_reference("adapter", text)


def test_a_mix_is_called_by_its_parts_and_counts_for_them_whatever_their_weights() -> None:
    label = summed([("org/a@main@2", as_float32(0.7)), ("b@1", 1.0), ("b@3", -1e-8)])

    assert label == "org/a@main@2*0.7+b@1+b@3*-1e-08"
    assert summed([("a", 100.0), ("a", as_float32(0.5000001))]) == "a*100+a*0.5000001"
    assert unweighted(label) == "org/a@main@2+b@1+b@3"
    assert account_of(label) == "org/a@main+b"
    assert is_mix(label)
    assert is_mix(summed([("a@1", 0.5)]))
    for alone in ("org/a@main@2", "a@1", ""):
        assert not is_mix(alone)
        assert unweighted(alone) == alone
    assert (account_of("org/a@main@2"), account_of("")) == ("org/a@main", "")


def test_a_revision_is_split_off() -> None:
    assert split_revision("org/a@main") == ("org/a", "main")
    assert split_revision("org/a") == ("org/a", "")


def test_a_path_may_end_inside_of_any_root(tmp_path: Path) -> None:
    for folder in ("one/a", "two/b", "three/c"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "one" / "link").symlink_to(tmp_path / "two" / "b")
    (tmp_path / "one" / "out").symlink_to(tmp_path / "three" / "c")
    roots = (tmp_path / "one", tmp_path / "two")

    assert tmp_path / "one" / "a" == resolve_inside(roots, tmp_path / "one" / "a")
    assert tmp_path / "two" / "b" == resolve_inside(roots, tmp_path / "one" / "link")
    assert resolve_inside(roots[:1], tmp_path / "one" / "link") is None
    assert resolve_inside(roots, tmp_path / "one" / "out") is None
    assert tmp_path / "three" / "c" == resolve_inside((), tmp_path / "one" / "out")


@pytest.mark.parametrize("path", ["..", "../other", "a/../../b", "/etc", "a\0b"], ids=repr)
def test_a_path_may_not_leave_the_roots(tmp_path: Path, path: str) -> None:
    assert resolve_inside((tmp_path,), tmp_path / path) is None


def test_a_root_that_is_a_link_is_where_it_leads(tmp_path: Path) -> None:
    (tmp_path / "real" / "a").mkdir(parents=True)
    (tmp_path / "root").symlink_to(tmp_path / "real")

    assert tmp_path / "real" / "a" == resolve_inside((tmp_path / "root",), tmp_path / "root" / "a")


def test_links_in_a_circle_count_as_leaving(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")

    assert resolve_inside((tmp_path,), tmp_path / "a") is None
