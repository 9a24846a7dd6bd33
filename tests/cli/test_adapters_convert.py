"""`gralora adapters convert`, and how it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.checkpoints import lora_config, lora_tensors, write_checkpoint, write_gralora, write_lora

from gralora_runtime.adapters.checkpoint.writer import new_directory, replace_file
from gralora_runtime.errors import ConfigError
from gralora_server.cli.app import run
from gralora_server.cli.output import ExitCode


def convert(*arguments: object) -> int:
    return run(["adapters", "convert", *map(str, arguments)])


def test_it_says_what_was_written(tmp_path: Path, capsys) -> None:
    source, out = write_gralora(tmp_path / "a", r=8, k=2, hybrid_r=4), tmp_path / "new" / "b"

    assert convert(source, out, "--to", "lora", "--json") == ExitCode.OK
    said = json.loads(capsys.readouterr().out)
    run(["adapters", "inspect", str(out), "--json"])
    facts = json.loads(capsys.readouterr().out)

    assert {key: facts[key] for key in said if key != "path"} == {key: said[key] for key in said if key != "path"}
    assert (said["dialect"], said["r"], said["scale"]) == ("lora", 20, 16 / 12)


def test_it_says_so_for_people(tmp_path: Path, capsys) -> None:
    assert convert(write_lora(tmp_path / "a", r=4), tmp_path / "[b]", "--to", "gralora-authors") == ExitCode.OK

    assert "[b]: gralora-authors, r = 4, k = 1" in capsys.readouterr().out


@pytest.mark.parametrize("there", ["file", "directory with a file"])
def test_what_is_there_stays(there: str, tmp_path: Path, capsys) -> None:
    source, out = write_gralora(tmp_path / "a"), tmp_path / "out"
    kept = out if there == "file" else out / "kept"
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("mine")

    assert convert(source, out, "--to", "lora") == ExitCode.USAGE

    assert "is not an empty directory" in capsys.readouterr().err
    assert kept.read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "out"]


def test_an_empty_directory_is_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()

    assert convert(write_gralora(tmp_path / "a"), tmp_path / "out", "--to", "gralora-authors") == ExitCode.OK
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_what_has_no_exact_form_is_exit_code_4_and_nothing_is_written(tmp_path: Path, capsys) -> None:
    config = lora_config(r=4, alpha_pattern={"v_proj": 5})
    source = write_checkpoint(tmp_path / "a", config, lora_tensors(r=4))

    assert convert(source, tmp_path / "out", "--to", "gralora") == ExitCode.UNFIT_ADAPTER

    assert "scales 4 (4 modules), 1.25 (2 modules)" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_directory_that_cannot_be_finished_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with new_directory(tmp_path / "out") as fresh:
            (fresh / "half").write_text("x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()

    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_somebody_fills_meanwhile_stays_theirs(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def race() -> None:
        with new_directory(out) as fresh:
            (fresh / "ours").write_text("x")
            out.mkdir()
            (out / "theirs").write_text("y")

    with pytest.raises(ConfigError, match="cannot be written"):
        race()

    assert [path.name for path in out.iterdir()] == ["theirs"]


def test_a_new_directory_has_the_rights_that_any_other_would_have(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()

    with new_directory(tmp_path / "out") as fresh:
        (fresh / "x").write_text("x")

    assert (tmp_path / "out").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_file_is_replaced_or_stays(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_text("old")

    replace_file(path, "new")

    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(ConfigError, match="cannot be written"):
        replace_file(tmp_path / "nowhere" / "f", "new")
