"""The record of golden answers: what is written is read back, and what a stranger wrote is refused in words."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gralora_runtime.adapters.checkpoint.golden import (
    MAX_BYTES,
    Golden,
    GoldenCase,
    read_golden,
    write_golden,
)
from gralora_runtime.adapters.checkpoint.header import GOLDEN_FILE
from gralora_runtime.errors import AdapterRejectedError, ConfigError

VOCAB = 320
GOOD = {"version": 1, "model": "m", "cases": [{"prompt_token_ids": [0, 319], "expected_token_ids": [5]}]}


def golden_of(*, prompt: int = 1, expected: int = 1, cases: int = 1, token: int = 7) -> Golden:
    case = GoldenCase(prompt_token_ids=(token,) * prompt, expected_token_ids=(token,) * expected)
    return Golden(model="m", cases=(case,) * cases)


def written(folder: Path, document: object) -> Path:
    (folder / GOLDEN_FILE).write_text(document if isinstance(document, str) else json.dumps(document))
    return folder


def rejection(folder: Path, root: Path | None = None) -> tuple[str, ...]:
    with pytest.raises(AdapterRejectedError) as caught:
        read_golden(folder, vocab_size=VOCAB, roots=(root,) if root else ())
    return caught.value.problems


def test_no_file_is_no_golden_answers(tmp_path: Path) -> None:
    assert read_golden(tmp_path, vocab_size=VOCAB) is None
    assert read_golden(tmp_path / "nowhere", vocab_size=VOCAB) is None


IDS = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=40).map(tuple)
CASES = st.builds(GoldenCase, prompt_token_ids=IDS, expected_token_ids=IDS)


@given(cases=st.lists(CASES, min_size=1, max_size=16).map(tuple), model=st.text(max_size=64))
def test_what_is_written_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, cases: tuple[GoldenCase, ...], model: str
) -> None:
    folder = tmp_path_factory.mktemp("golden")
    golden = Golden(model=model, cases=cases)

    write_golden(folder, golden, vocab_size=VOCAB)

    assert read_golden(folder, vocab_size=VOCAB) == golden
    assert [path.name for path in folder.iterdir()] == [GOLDEN_FILE]


def test_as_much_as_is_allowed_is_read_back(tmp_path: Path) -> None:
    golden = golden_of(prompt=512, expected=64, cases=16)

    write_golden(tmp_path, golden, vocab_size=VOCAB)

    assert read_golden(tmp_path, vocab_size=VOCAB) == golden


@pytest.mark.parametrize(
    ("golden", "told"),
    [
        (golden_of(prompt=513), "cases[0].prompt_token_ids: "),
        (golden_of(expected=65), "cases[0].expected_token_ids: "),
        (golden_of(cases=17), "is not a list of 1 to 16"),
        (golden_of(token=VOCAB), "cases[0].prompt_token_ids[0]: 320 is not a token id of this model (0 to 319)"),
        (golden_of(token=-1), "-1 is not a token id"),
    ],
)
def test_what_could_not_be_read_back_is_not_written(golden: Golden, told: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterRejectedError) as caught:
        write_golden(tmp_path, golden, vocab_size=VOCAB)

    assert told in caught.value.problems[0]
    assert list(tmp_path.iterdir()) == []


def test_too_many_bytes_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(AdapterRejectedError, match=f"at most {MAX_BYTES}"):
        write_golden(tmp_path, golden_of(prompt=512, expected=64, cases=16, token=10**7), vocab_size=10**8)

    assert list(tmp_path.iterdir()) == []


def changed(**changes: Any) -> dict[str, Any]:
    return GOOD | changes


BAD: dict[str, tuple[object, str]] = {
    "no JSON": ("{", "golden.json is not JSON"),
    "a list": ("[1]", "is not a JSON object but list"),
    "a key twice": ('{"version": 1, "version": 1}', "a key stands twice"),
    "too large": (" " * (MAX_BYTES + 1), f"has more than {MAX_BYTES} bytes"),
    "too many values": ('{"cases": [' + "0," * 30_000 + "0]}", "entries"),
    "too deep": ('{"cases": ' + "[" * 10_000 + "]" * 10_000 + "}", "is not JSON"),
    "a number of 100 digits": ('{"version": ' + "1" * 100 + "}", "a number of 100 characters"),
    "another version": (changed(version=2), "version: 2 is not 1"),
    "a version that is true": (changed(version=True), "version: True is not 1"),
    "no model": (changed(model=None), "model: None is not a string"),
    "a long model": (changed(model="x" * 257), "is not a string of at most 256"),
    "no cases": (changed(cases=[]), "cases: [] is not a list of 1 to 16"),
    "cases that are no list": (changed(cases={"a": 1}), "is not a list of 1 to 16"),
    "a key too many": (changed(note="x"), "'note' is unknown"),
    "a case that is a list": (changed(cases=[[1]]), "cases[0]: [1] is not an object of"),
    "a case without an answer": (changed(cases=[{"prompt_token_ids": [1]}]), "is not an object of"),
    "an empty prompt": (
        changed(cases=[{"prompt_token_ids": [], "expected_token_ids": [1]}]),
        "cases[0].prompt_token_ids: [] is not a list of 1 to 512",
    ),
    "an id that is a float": (
        changed(cases=[*GOOD["cases"], {"prompt_token_ids": [1, 2.0], "expected_token_ids": [1]}]),
        "cases[1].prompt_token_ids[1]: 2.0 is not a token id",
    ),
    "an id that is true": (
        changed(cases=[{"prompt_token_ids": [True], "expected_token_ids": [1]}]),
        "prompt_token_ids[0]: True is not a token id",
    ),
    "an id beyond the vocabulary": (
        changed(cases=[{"prompt_token_ids": [1], "expected_token_ids": [320]}]),
        "expected_token_ids[0]: 320 is not a token id of this model (0 to 319)",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_malformed_is_refused_in_words(kind: str, tmp_path: Path) -> None:
    document, told = BAD[kind]

    assert told in "\n".join(rejection(written(tmp_path, document)))


def test_every_reason_is_told_at_once_and_shortly(tmp_path: Path) -> None:
    document = {"version": "x" * 9999, "cases": [{"prompt_token_ids": ["y" * 9999], "expected_token_ids": []}]}

    problems = rejection(written(tmp_path, document))

    assert len(problems) == 4
    assert max(map(len, problems)) < 200


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo], ids=["directory", "pipe"])
def test_what_is_no_regular_file_is_never_opened(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / GOLDEN_FILE)

    assert rejection(tmp_path) == (f"{GOLDEN_FILE} is missing",)


def test_a_link_out_of_the_root_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "root" / "a"
    folder.mkdir(parents=True)
    written(tmp_path, GOOD)
    (folder / GOLDEN_FILE).symlink_to(tmp_path / GOLDEN_FILE)

    (problem,) = rejection(folder, tmp_path / "root")
    assert problem.startswith(f"{GOLDEN_FILE} leaves the adapters directory")


def test_a_directory_that_takes_no_file_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be written"):
        write_golden(tmp_path / "nowhere", golden_of(), vocab_size=VOCAB)
