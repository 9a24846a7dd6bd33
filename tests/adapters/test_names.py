"""Names and paths that a stranger sends."""

from __future__ import annotations

from pathlib import Path

import pytest

from gralora_runtime.adapters.catalogue.names import check_name, resolve_inside, resolve_source
from gralora_runtime.errors import InvalidRequestError


@pytest.mark.parametrize("name", ["a", "A-1", "x.y_z", "0", "a" * 128])
def test_ordinary_names_pass(name: str) -> None:
    check_name("adapter", name)


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../x", "/etc", "a/b", "a\\b", ".hidden", "-x", "_x", "a b", "a\0b", "a\n", "ä", "a" * 129, "a%2f"],
    ids=repr,
)
def test_names_that_could_be_more_than_a_name_are_refused(name: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        check_name("adapter", name)

    assert caught.value.field == "adapter"


def test_a_path_is_relative_to_the_adapters_directory(tmp_path: Path) -> None:
    assert tmp_path / "team" / "a" == resolve_source(tmp_path, Path("team/a"))
    assert tmp_path / "a" == resolve_source(tmp_path, tmp_path / "a")


@pytest.mark.parametrize("path", ["..", "../other", "a/../../b", "/etc", "a\0b"], ids=repr)
def test_a_path_may_not_leave_the_adapters_directory(tmp_path: Path, path: str) -> None:
    with pytest.raises(InvalidRequestError):
        resolve_source(tmp_path, Path(path))


def test_a_link_that_leaves_the_adapters_directory_is_refused(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    root.mkdir()
    outside.mkdir()
    (root / "link").symlink_to(outside)

    with pytest.raises(InvalidRequestError):
        resolve_source(root, Path("link"))


def test_links_in_a_circle_count_as_leaving(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")

    assert resolve_inside(tmp_path, tmp_path / "a") is None


def test_without_an_adapters_directory_no_path_is_taken() -> None:
    with pytest.raises(InvalidRequestError):
        resolve_source(None, Path("a"))
