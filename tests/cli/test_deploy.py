"""What `deploy/` says of the program is so: its commands, their options, its variables, its configuration."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from gralora_server.cli.app import app, run
from gralora_server.cli.output import ExitCode
from gralora_server.settings.layers import Layers
from gralora_server.settings.table import SETTINGS

ROOT = Path(__file__).parent.parent.parent
DEPLOY = ROOT / "deploy"
UNIT, CONTAINER, CONFIG = DEPLOY / "gralora.service", DEPLOY / "Containerfile", DEPLOY / "gralora.toml"
OTHER_VARIABLES = {"GRALORA_CACHE", "GRALORA_CONFIG", "NUMBA_CACHE_DIR", "TRITON_CACHE_DIR", "PATH"}


def directives(path: Path) -> Iterator[tuple[str, str]]:
    """Name and value of each line of the unit that is not a comment."""
    for line in path.read_text().splitlines():
        name, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            yield name, value


def instructions() -> Iterator[tuple[str, str]]:
    """Of the Containerfile, with the lines that belong together joined."""
    text = re.sub(r"\\\n\s*", "", "".join(line for line in CONTAINER.read_text().splitlines(True) if line[0] != "#"))
    for line in filter(None, text.splitlines()):
        name, _, rest = line.partition(" ")
        yield name, rest


def container_commands() -> list[list[str]]:
    given = list(instructions())
    (entry,) = [json.loads(rest) for name, rest in given if name == "ENTRYPOINT"]
    (command,) = [json.loads(rest) for name, rest in given if name == "CMD"]
    (health,) = [json.loads(rest[rest.index("CMD ") + 4 :]) for name, rest in given if name == "HEALTHCHECK"]
    return [entry + command, health]


def unit_commands() -> list[list[str]]:
    return [shlex.split(value) for name, value in directives(UNIT) if name.startswith("Exec") and "gralora" in value]


@pytest.mark.parametrize("words", [*container_commands(), *unit_commands()], ids=" ".join)
def test_commands_and_their_options_exist(words: list[str]) -> None:
    command: Any = typer.main.get_command(app)
    program, *rest = words
    while rest and hasattr(command, "commands"):
        command = command.commands[rest.pop(0)]
    known = {name for parameter in command.params for name in parameter.opts}

    assert Path(program).name == "gralora"
    assert {word for word in rest if word.startswith("-")} <= known


def test_the_unit_and_the_container_set_variables_that_are_read() -> None:
    ours = {name for setting in SETTINGS for name in setting.variables} | OTHER_VARIABLES | {"PYTHONDONTWRITEBYTECODE"}
    in_unit = [word for name, value in directives(UNIT) if name == "Environment" for word in shlex.split(value)]
    in_container = [word for name, rest in instructions() if name == "ENV" for word in shlex.split(rest)]
    environment = dict(word.split("=", 1) for word in in_container)

    assert {word.partition("=")[0] for word in in_unit + in_container} <= ours
    assert Layers(CONFIG, environment, {}).read().settings.server.address == "0.0.0.0:50051"


def test_the_container_is_built_of_what_is_there_and_runs_as_nobody_special() -> None:
    given = list(instructions())
    bases = [rest.split()[0] for name, rest in given if name == "FROM"]
    copied = [
        Path(word) for name, rest in given if name == "COPY" and "--from" not in rest for word in rest.split()[:-1]
    ]
    (user,) = [rest for name, rest in given if name == "USER"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = [*project["tool"]["setuptools"]["package-dir"].values(), project["project"]["readme"], "constraints.txt"]

    assert len(bases) == 2
    assert all(re.fullmatch(r"docker\.io/library/python:3\.11\.\d+-slim-bookworm", base) for base in bases)
    assert all((ROOT / path).exists() for path in copied)
    assert all(any(Path(path).is_relative_to(there) for there in copied) for path in needed)
    assert 0 not in map(int, user.split(":"))


def test_the_unit_stops_later_than_the_server_drains_and_reads_the_file_that_it_checks() -> None:
    unit = dict(directives(UNIT))
    files = {word for words in unit_commands() for word in words if word.endswith(".toml")}

    assert float(unit["TimeoutStopSec"]) > Layers(CONFIG, {}, {}).read().settings.server.grace_s
    assert files == {"/etc/gralora/gralora.toml"}
    assert int(unit["RestartPreventExitStatus"]) == ExitCode.USAGE


def test_systemd_understands_the_unit(tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("there is no systemd-analyze")
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace("/opt/gralora/bin/gralora", sys.executable))
    done = subprocess.run([analyze, "verify", "--man=no", str(unit)], capture_output=True, text=True, check=False)

    assert "gralora.service" not in done.stderr, done.stderr


def test_the_configuration_is_valid_with_and_without_its_tenants(tmp_path: Path) -> None:
    text = CONFIG.read_text()
    begin = text.index("# [tenants.acme]")
    whole = tmp_path / "gralora.toml"
    whole.write_text(text[:begin] + re.sub(r"(?m)^# ?", "", text[begin:]))

    assert run(["config", "check", str(CONFIG)]) == ExitCode.OK
    assert run(["config", "check", str(whole)]) == ExitCode.OK
    assert Layers(CONFIG, {}, {}).read().settings.tenants == {}
    assert Layers(whole, {}, {}).read().settings.tenants["acme"].limits.streams == 32
