"""Documents name what is there: files, sections, commands, options, series, reasons, and figures of the results."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import MagicMock

import pytest
import typer

from gralora_runtime.errors import GraloraError
from gralora_server.cli.app import app, run
from gralora_server.cli.output import ExitCode
from gralora_server.explanation import CODES
from gralora_server.gate import Gate
from gralora_server.http.adapters import AdapterEndpoints
from gralora_server.http.generation import GenerationEndpoints
from gralora_server.http.server_endpoints import ServerEndpoints
from gralora_server.servicers import AdapterServicer

ROOT = Path(__file__).parent.parent
DOCUMENTS = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))]
LINKING = [*DOCUMENTS, "ARCHITECTURE.md", "CONTRIBUTING.md", "SECURITY.md", "examples/README.md"]
MAPPING = "docs/from-vllm-lorax.md"  # the first column of its tables is others' own
README_WORDS = 900  # that a stranger reads in three minutes
# The table of the README, and what the results call its rows.
CONTENDERS = {
    "**this server's engine, 16 customers**": "our engine, 16 adapters",
    "this server's engine, base model only": "our engine, base model",
    "vLLM 0.32, one merged model, one batch: a single customer": "vLLM, 1 merged model",
    "transformers, one merged model, one batch: a single customer": "transformers, 1 merged model, one batch",
    "16 merged models taking turns, this engine": "our engine, merged models in turn",
    "vLLM 0.32, 16 LoRAs that equal the adapters": "vLLM, exact LoRAs",
    "PEFT, `set_adapter` for each request": "PEFT, set_adapter, one by one",
}


def read(name: str) -> str:
    return (ROOT / name).read_text()


def rows(text: str) -> Iterator[list[str]]:
    """Cells of the lines of tables. A bar that belongs to a cell has a backslash before it."""
    for line in text.splitlines():
        if line.startswith("|"):
            yield [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def ours(name: str) -> str:
    """What a document says of us: of a table that maps others' names to ours, not the names of others."""
    text = read(name)
    if name != MAPPING:
        return text
    prose = [line for line in text.splitlines() if not line.startswith("|")]
    return "\n".join([*prose, *(" ".join(cells[1:]) for cells in rows(text))])


def sections(path: Path) -> set[str]:
    """Of a document, as links call them."""
    titles = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def commands(text: str) -> Iterator[list[str]]:
    """Words behind `gralora`, in lines of code and in quotations. What explains one stands two blanks behind it."""
    lines = re.findall(r"^ *(?:\.venv/bin/)?gralora (.+)$", text, re.MULTILINE)
    for found in [*lines, *re.findall(r"`gralora ([^`]+)`", text)]:
        yield re.split(r"  |#", found)[0].split()


def command_of(command: Any, words: list[str]) -> Any:
    for word in words:
        if not hasattr(command, "commands") or word.startswith("-"):
            break
        assert word in command.commands, f"there is no {' '.join(words)}"
        command = command.commands[word]
    return command


def options_of(command: Any) -> set[str]:
    names = {name for one in command.params for name in (*one.opts, *one.secondary_opts)}
    return names | {"--help"}


def options_of_all(command: Any) -> set[str]:
    below = [options_of_all(one) for one in getattr(command, "commands", {}).values()]
    return options_of(command).union(*below)


def kinds(base: type[GraloraError]) -> Iterator[type[GraloraError]]:
    yield base
    for kind in base.__subclasses__():
        yield from kinds(kind)


@pytest.fixture(scope="module")
def gralora() -> Any:
    """The program's commands."""
    return typer.main.get_command(app)


@pytest.mark.parametrize("name", ["SECURITY.md", "docs/config.md"])
def test_files_that_a_document_names_exist(name: str) -> None:
    named = re.findall(r"`((?:[\w.-]+/)+[\w.-]+\.\w+|[\w-]+\.txt)`", read(name))

    assert [path for path in named if not (ROOT / path).exists()] == []
    assert named or name != "SECURITY.md"


@pytest.mark.parametrize("name", LINKING)
def test_links_lead_to_files_and_sections_that_exist(name: str) -> None:
    here = ROOT / name
    for target in re.findall(r"\]\(([^)\s]+)\)", here.read_text()):
        if target.startswith("https://"):
            continue
        path, _, section = target.partition("#")
        there = (here.parent / path) if path else here

        assert there.exists(), target
        assert not section or section in sections(there), target


def test_every_page_can_be_reached_from_the_readme() -> None:
    linked = set(re.findall(r"\]\((docs/[\w-]+\.md)", read("README.md")))

    assert set(DOCUMENTS) - {"README.md"} == linked


def test_the_readme_is_short() -> None:
    assert len(read("README.md").split()) <= README_WORDS


@pytest.mark.parametrize("name", DOCUMENTS)
def test_commands_that_a_document_shows_exist_with_their_options(name: str, gralora: Any) -> None:
    for words in commands(ours(name)):
        shown = {word.partition("=")[0] for word in words if word.startswith("--")}

        assert shown <= options_of(command_of(gralora, words)), words


@pytest.mark.parametrize("name", DOCUMENTS)
def test_options_that_a_document_quotes_exist(name: str, gralora: Any) -> None:
    quoted = set(re.findall(r"`(--[a-z][a-z0-9-]*)", ours(name)))

    assert quoted <= options_of_all(gralora)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_series_that_a_document_quotes_exist(name: str) -> None:
    quoted = set(re.findall(r"`(gralora_\w+|vllm:\w+)`", ours(name)))
    series = {cells[0].strip("`") for cells in rows(read("docs/metrics.md"))}

    assert quoted <= series


def test_the_configuration_on_the_page_of_tenants_is_valid(tmp_path: Path) -> None:
    (shown,) = re.findall(r"^```toml\n(.+?)^```", read("docs/tenants.md"), re.MULTILINE | re.DOTALL)
    file = tmp_path / "gralora.toml"
    file.write_text(shown)

    assert run(["config", "check", str(file)]) == ExitCode.OK


def test_the_client_page_has_every_reason_of_a_status() -> None:
    codes = {
        (kind.reason, code.name)
        for kind in kinds(GraloraError)
        if kind.__module__.startswith("gralora_")
        if (code := next((CODES[one] for one in kind.__mro__ if one in CODES), None)) is not None
    }
    table = read("docs/client.md").partition("## What a reason asks for")[2]
    told = {(cells[0].strip("`"), cells[1]) for cells in rows(table) if cells[0].startswith("`")}

    assert told == codes | {("INTERNAL", "INTERNAL")}


def test_the_page_of_http_has_every_endpoint() -> None:
    gate, anything = Gate(), MagicMock()
    endpoints = [
        *GenerationEndpoints(gate, anything, write_timeout_s=1).all(),
        *AdapterEndpoints(gate, AdapterServicer(gate, anything, anything)).all(),
        *ServerEndpoints(gate, anything, ()).all(),
    ]
    table = read("docs/http.md").partition("## Endpoints")[2].partition("##")[0]

    assert set(re.findall(r"`((?:GET|POST|DELETE) [^`]+)`", table)) == {
        f"{endpoint.verb} {endpoint.path.replace('{name:path}', 'NAME')}" for endpoint in endpoints
    }


@pytest.mark.parametrize(("column", "result"), [(1, "bench.json"), (2, "bench-avx512.json")])
def test_the_readme_has_the_speeds_of_the_results(column: int, result: str) -> None:
    document = json.loads(read(f"benchmarks/results/{result}"))
    (crowd,) = [section for section in document["sections"] if section["key"] == "crowd"]
    measured = {
        row["contender"]: round(row["tokens"] / median(row["samples_s"]))
        for row in crowd["rows"]
        if row["measure"] == "whole run"
    }
    told = {cells[0]: int(cells[column].strip("*")) for cells in rows(read("README.md")) if cells[0] in CONTENDERS}

    assert told == {title: measured[contender] for title, contender in CONTENDERS.items()}
