"""`gralora config` and `gralora health`, and that the documentation and the example say what the program does."""

from __future__ import annotations

import asyncio
import json
import tomllib
from pathlib import Path

import pytest
from support.grpc_harness import served
from support.tenants import OPERATOR, admitting_the_operator

from gralora_server.cli.app import run
from gralora_server.cli.output import ExitCode
from gralora_server.settings.layers import Layers
from gralora_server.settings.reference import table
from gralora_server.settings.reloader import Reloader
from gralora_server.settings.sections import Settings
from gralora_server.settings.table import SETTINGS, sections
from gralora_server.settings.writing import example
from gralora_server.tenants import settings as tenants

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "gralora.toml"
    path.write_text('[engine]\nmax_queue = 7\n[adapters]\nhub_token = "sesame"\n[tenants.acme]\nweight = 2\n')
    return path


def test_check_says_that_nothing_is_wrong(file: Path, capsys) -> None:
    assert run(["config", "check", str(file)]) == ExitCode.OK
    assert capsys.readouterr().out == f"{file}: nothing is wrong with it\n"


def test_check_lists_all_that_is_wrong(file: Path, capsys) -> None:
    file.write_text("[engine]\nmax_queue = 0\nthreads = 0\n")
    assert run(["config", "check", str(file)]) == ExitCode.USAGE
    out, err = capsys.readouterr()

    assert out == ""
    assert [line.partition(" should")[0] for line in err.splitlines()] == [
        f"error: {file}:2: engine.max_queue",
        f"error: {file}:3: engine.threads",
    ]


def test_check_json_is_one_document(file: Path, capsys) -> None:
    file.write_text("[engine]\nmax_queue = 0\n")
    assert run(["config", "check", str(file), "--json"]) == ExitCode.USAGE
    out, err = capsys.readouterr()

    assert err == ""
    assert json.loads(out)["problems"] == [f"{file}:2: engine.max_queue should be greater than or equal to 1, got 0"]


def test_check_looks_at_the_file_alone(file: Path, monkeypatch) -> None:
    """What one machine's environment mends would be wrong on the next."""
    file.write_text('[server]\ntls_cert = "c"\n')
    monkeypatch.setenv("GRALORA_SERVER_TLS_KEY", "k")
    assert run(["config", "check", str(file)]) == ExitCode.USAGE


def shown(capsys, *arguments: str) -> dict[str, tuple[object, str]]:
    assert run(["config", "show", *arguments, "--json"]) == ExitCode.OK
    rows = json.loads(capsys.readouterr().out)["settings"]
    return {row["key"]: (row["value"], row["from"]) for row in rows}


def test_show_says_where_each_setting_comes_from(file: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("GRALORA_MEMORY_HOST_CACHE_BYTES", "2097152")
    found = shown(capsys, str(file), "--adapters", "/a,hold", "--no-reflection")

    assert found["engine.max_queue"] == (7, f"{file}:2")
    assert found["memory.host_cache_bytes"] == ("2MiB", "$GRALORA_MEMORY_HOST_CACHE_BYTES")
    assert found["adapters.sources"] == (["/a,hold"], "--adapters")
    assert found["server.reflection"] == (False, "--reflection")
    assert found["engine.max_num_seqs"] == (32, "default")
    assert found["engine.cuda_graphs"] == ("on", "default")
    assert found["tenants.acme.weight"] == (2.0, f"{file}:6")
    assert found["tenants.acme.limits.burst_s"] == (10.0, "default")
    assert found["public_base_model"] == (True, "default")
    assert found["admin_tokens"] == ([], "default")
    assert {setting.key for setting in SETTINGS} <= found.keys()


def test_show_takes_the_file_that_serve_would_take(file: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("GRALORA_CONFIG", str(file))

    assert shown(capsys)["engine.max_queue"] == (7, f"{file}:2")


@pytest.mark.parametrize("options", [[], ["--json"]], ids=["table", "json"])
def test_show_keeps_secrets(options: list[str], file: Path, capsys) -> None:
    file.write_text(file.read_text() + f'[[tenants.acme.tokens]]\nsha256 = "{"5" * 64}"\nrole = "manage"\n')
    assert run(["config", "show", str(file), *options]) == ExitCode.OK
    out = capsys.readouterr().out

    assert "sesame" not in out
    assert "555555" not in out
    assert "(not shown)" in out
    assert "manage" in out


def test_schema_is_a_json_schema_that_knows_every_setting(capsys) -> None:
    assert run(["config", "schema"]) == ExitCode.OK
    schema = json.loads(capsys.readouterr().out)

    assert set(schema["properties"]) == set(Settings.model_fields)
    assert schema["additionalProperties"] is False
    assert schema["$defs"]["EngineSettings"]["properties"]["device"]["enum"] == ["auto", "cpu", "cuda"]
    for setting in SETTINGS:
        section = sections()[setting.section].__name__
        assert schema["$defs"][section]["properties"][setting.name]["description"] == setting.text


def test_the_example_says_the_defaults(tmp_path: Path, capsys) -> None:
    """With the marks of comments taken from what has a value, it is a file that changes nothing."""
    assert run(["config", "schema", "--toml"]) == ExitCode.OK
    text = capsys.readouterr().out
    named = {setting.name: setting for setting in SETTINGS}
    head = text[: text.index("# At the top of the file")]
    rows = [row.removeprefix("# ") for row in head.splitlines() if row.startswith("[") or " = " in row]
    given = [row for row in rows if row.startswith("[") or row.partition(" = ")[2] != named[row.split()[0]].kind]
    file = tmp_path / "gralora.toml"
    file.write_text("\n".join(given))
    with_values = {setting.name for setting in SETTINGS if setting.default is not None} | {"cuda_graphs"}

    assert tomllib.loads(text).keys() == sections().keys()
    assert Layers(file, {}, {}).read().settings == Settings()
    assert {row.split()[0] for row in given if not row.startswith("[")} == with_values


def test_the_example_names_everything_that_is_said_of_tenants() -> None:
    models = [kind for kind in vars(tenants).values() if isinstance(kind, type) and issubclass(kind, tenants.Strict)]
    words = set(example().replace("[", " ").replace("]", " ").replace(".", " ").split())

    assert {name for model in models for name in model.model_fields} <= words


def weigh(file: Path, weight: float) -> None:
    file.write_text(f"[tenants.acme]\nweight = {weight}\n{admitting_the_operator()}")


async def test_reload_says_what_changed_or_why_not(file: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("GRALORA_TOKEN", OPERATOR)

    async def reload(port: int, *options: str) -> int:
        return await asyncio.to_thread(run, ["config", "reload", "--address", f"127.0.0.1:{port}", *options])

    weigh(file, 2)
    async with served(reloader=Reloader(Layers(file, {}, {}).read)) as s:
        weigh(file, 3)
        assert await reload(s.port) == ExitCode.OK
        assert await reload(s.port, "--json") == ExitCode.OK
        weigh(file, 0)
        assert await reload(s.port) == ExitCode.FAILED
    out, err = capsys.readouterr()

    assert out.splitlines() == ["reloaded; changed: tenants", '{"changed": []}']
    assert f"{file}:2: tenants.acme.weight should be greater than 0" in err


@pytest.mark.parametrize(("started", "code"), [(True, ExitCode.OK), (False, ExitCode.UNREACHABLE)])
async def test_health_is_an_exit_code(started: bool, code: ExitCode, tmp_path: Path, capsys) -> None:
    """Without a token, because probes have none."""
    tokens = tmp_path / "tokens"
    tokens.write_text("a-token-of-enough-characters\n")
    async with served(started=started, auth_token_file=tokens) as s:
        arguments = ["health", "--address", f"127.0.0.1:{s.port}", "--within-s", "1" if not started else "10"]
        assert await asyncio.to_thread(run, arguments) == code
    out, _ = capsys.readouterr()

    assert out == ""


def test_the_documentation_is_up_to_date() -> None:
    assert table() in (ROOT / "docs" / "config.md").read_text(), (
        "docs/config.md is stale: python scripts/config_table.py"
    )


def test_the_tenants_of_the_documentation_are_valid(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "config.md").read_text()
    file = tmp_path / "gralora.toml"
    file.write_text("\n".join(line[4:] for line in text[text.index("## Tenants") :].splitlines() if line[:4] == "    "))
    settings = Layers(file, {}, {}).read().settings

    assert settings.tenants["acme"].certificates[0].subject == "client.acme.example"
    assert settings.jwt is not None
