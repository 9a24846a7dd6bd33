"""Commands against the real gRPC server, with an engine that the test plays. A command runs in a thread."""

from __future__ import annotations

import asyncio
import io
import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from support.fake_engine import finished, token
from support.grpc_harness import served

from gralora_runtime.errors import (
    AdapterBusyError,
    AdapterNotFoundError,
    AdapterRejectedError,
    DrainingError,
    GraloraError,
)
from gralora_runtime.request import ChatMessage, Prompt, StructuredOutput, WeightedAdapter
from gralora_server import model_fetch
from gralora_server.cli.app import run
from gralora_server.cli.output import ExitCode
from gralora_server.config import TlsConfig
from gralora_server.tenants.usage import Counts

PEMS = Path(__file__).parent.parent / "server" / "tls"


async def gralora(*arguments: str, port: int) -> int:
    return await asyncio.to_thread(run, [*arguments, "--address", f"127.0.0.1:{port}"])


def error_line(text: str) -> str:
    """The only line on standard error."""
    (line,) = text.splitlines()
    assert line.startswith("error: ")
    return line


async def test_generate_prints_the_text_and_nothing_else(capsys) -> None:
    async with served() as s:
        s.engine.script = [token(1), token(2), finished(output_tokens=2)]
        code = await gralora("generate", "hi", "--adapter", "poet", port=s.port)
    out, err = capsys.readouterr()

    assert code == ExitCode.OK
    assert out == "t1 t2 \n"
    assert "poet (aaaaaaaaaaaa), 2 tokens" in err
    assert s.engine.requests[0].adapter == "poet"
    assert s.engine.requests[0].prompt == Prompt(messages=(ChatMessage("user", "hi"),))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["poet=0.5", "pirate@3"], (WeightedAdapter("poet", 0.5), WeightedAdapter("pirate@3"))),
        (["poet=-2"], (WeightedAdapter("poet", -2.0),)),
    ],
)
async def test_generate_adds_up_several_adapters(options: list[str], expected, capsys) -> None:
    async with served() as s:
        s.engine.script = [token(1), finished(output_tokens=1)]
        asked = [argument for option in options for argument in ("--adapter", option)]
        assert await gralora("generate", "hi", *asked, port=s.port) == ExitCode.OK

    assert s.engine.requests[0].adapters == expected
    assert options[0].replace("=", "*") in capsys.readouterr().err


async def test_generate_without_streaming_prints_the_same(capsys) -> None:
    async with served() as s:
        s.engine.script = [token(1), token(2), finished(output_tokens=2)]
        await gralora("generate", "hi", "--no-stream", port=s.port)

    assert capsys.readouterr().out == "t1 t2 \n"


async def test_generate_json_is_one_document(capsys) -> None:
    async with served() as s:
        s.engine.script = [token(1), finished(output_tokens=1)]
        code = await gralora("generate", "hi", "--json", port=s.port)
    out, err = capsys.readouterr()
    document = json.loads(out)

    assert code == ExitCode.OK
    assert err == ""
    assert document["text"] == "t1 "
    assert document["finish_reason"] == "length"
    assert document["usage"] == {"prompt_tokens": 3, "cached_tokens": 1, "output_tokens": 1}


async def test_generate_raw_sends_text_and_a_dash_reads_standard_input(monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("from a pipe"))
    async with served() as s:
        s.engine.script = [finished()]
        await gralora("generate", "-", "--raw", port=s.port)

    assert s.engine.requests[0].prompt == Prompt(text="from a pipe")


async def test_generate_options_reach_the_engine() -> None:
    options = (
        "--system", "be brief", "--max-tokens", "5", "--temperature", "0.5", "--top-p", "0.75", "--top-k", "3",
        "--min-p", "0.25", "--repetition-penalty", "1.5", "--seed", "7", "--stop", "a", "--stop", "b",
        "--ignore-eos", "--request-id", "mine",
    )  # fmt: skip
    async with served() as s:
        s.engine.script = [finished()]
        code = await gralora("generate", "hi", *options, port=s.port)
    (request,) = s.engine.requests

    assert code == ExitCode.OK
    assert request.request_id == "mine"
    assert request.prompt == Prompt(messages=(ChatMessage("system", "be brief"), ChatMessage("user", "hi")))
    assert (request.sampling.temperature, request.sampling.top_p, request.sampling.top_k) == (0.5, 0.75, 3)
    assert (request.sampling.min_p, request.sampling.repetition_penalty, request.sampling.seed) == (0.25, 1.5, 7)
    assert (request.stopping.max_tokens, request.stopping.stop, request.stopping.ignore_eos) == (5, ("a", "b"), True)


async def test_what_the_answer_has_to_match_reaches_the_engine(tmp_path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "null"}')
    async with served() as s:
        s.engine.script = [finished()]
        for options in (("--json-schema", str(schema)), ("--regex", "a+"), ("--choice", "a", "--choice", "b")):
            assert await gralora("generate", "hi", *options, port=s.port) == ExitCode.OK

    assert [request.structured_output for request in s.engine.requests] == [
        StructuredOutput(json_schema='{"type": "null"}'),
        StructuredOutput(regex="a+"),
        StructuredOutput(choice=("a", "b")),
    ]


@pytest.mark.parametrize(
    ("refusal", "code"),
    [
        (AdapterNotFoundError("p"), ExitCode.FAILED),
        (AdapterRejectedError("p", ["wrong shape", "missing tensor"]), ExitCode.UNFIT_ADAPTER),
    ],
    ids=["refused", "unfit"],
)
async def test_a_refusal_is_one_line_and_its_exit_code(refusal: GraloraError, code: ExitCode, capsys) -> None:
    async with served() as s:
        s.engine.refusals = [refusal]
        assert await gralora("generate", "hi", port=s.port) == code
    out, err = capsys.readouterr()

    assert out == ""
    assert str(refusal) in error_line(err)


async def test_a_draining_server_is_reached_but_refuses(capsys) -> None:
    """Exit code 3 is for an address where nobody answers."""
    async with served() as s:
        s.engine.refusals = [DrainingError() for _ in range(4)]
        assert await gralora("generate", "hi", port=s.port) == ExitCode.FAILED

    assert "shutting down" in error_line(capsys.readouterr().err)


@pytest.mark.parametrize("command", [["generate", "hi"], ["adapters", "list"], ["status", "--json"]], ids=" ".join)
async def test_nobody_listening_is_exit_code_3(command: list[str], capsys) -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]
        assert await gralora(*command, port=port) == ExitCode.UNREACHABLE
    out, err = capsys.readouterr()

    assert out == ""
    assert f"127.0.0.1:{port}" in error_line(err)


async def test_waiting_for_a_server_that_never_comes_is_exit_code_3(capsys) -> None:
    async with served(started=False) as s:
        assert await gralora("status", "--wait-s", "0.2", port=s.port) == ExitCode.UNREACHABLE

    assert "not ready within 0.2 s" in error_line(capsys.readouterr().err)


async def test_adapters_list_prints_a_table(capsys) -> None:
    async with served() as s:
        assert await gralora("adapters", "list", port=s.port) == ExitCode.OK
    out = capsys.readouterr().out

    assert "poet" in out
    assert "resident" in out
    assert out.splitlines()[1].split()[-1] == "1"
    assert "`gralora adapters versions NAME` says what the warnings are." in out


@pytest.mark.parametrize(("command", "line"), [("versions", "poet@2: it is odd"), ("pin", "poet: it is odd")])
async def test_what_is_odd_about_one_adapter_is_printed(command: str, line: str, capsys) -> None:
    async with served() as s:
        assert await gralora("adapters", command, "poet", port=s.port) == ExitCode.OK

    assert line in capsys.readouterr().out.splitlines()


async def test_adapters_list_json(capsys) -> None:
    async with served() as s:
        await gralora("adapters", "list", "--json", port=s.port)
    (adapter,) = json.loads(capsys.readouterr().out)["adapters"]

    assert (adapter["name"], adapter["state"], adapter["equivalent_rank"]) == ("poet", "resident", 20)
    assert adapter["last_used"] == "2023-11-14T22:13:20.500000+00:00"
    assert adapter["warnings"] == ["it is odd"]


async def test_adapters_are_loaded_pinned_and_unloaded(capsys) -> None:
    async with served() as s:
        for command in (
            ["load", "poet", "--pin"],
            ["load", "poet", "below/poet"],
            ["pin", "poet"],
            ["pin", "poet", "--off"],
            ["unload", "poet"],
        ):
            assert await gralora("adapters", *command, "--json", port=s.port) == ExitCode.OK
    documents = [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    assert [document.get("pinned") for document in documents] == [True, False, True, False, None]
    assert documents[-1]["pool_bytes_freed"] == 1000
    assert s.engine.adapters.calls == [
        ("load", "poet", None, True),
        ("load", "poet", Path("below/poet"), False),
        ("pin", "poet", True),
        ("pin", "poet", False),
        ("unload", "poet"),
    ]


async def test_unloading_a_busy_adapter_is_refused(capsys) -> None:
    async with served() as s:
        s.engine.adapters.error = AdapterBusyError("poet", 3)
        assert await gralora("adapters", "unload", "poet", port=s.port) == ExitCode.FAILED

    assert "in use by 3 request(s)" in error_line(capsys.readouterr().err)


async def test_status_json(capsys) -> None:
    async with served() as s:
        assert await gralora("status", "--json", port=s.port) == ExitCode.OK
    document = json.loads(capsys.readouterr().out)

    assert document["info"]["model"] == "fake"
    assert document["load"]["waiting_for_adapter"] == 3


async def test_usage_is_a_table_or_a_document(capsys) -> None:
    async with served() as s:
        s.server.usage.add("", "poet", Counts(requests=12, prompt_tokens=345))
        s.server.usage.add("acme", "[bold]", Counts(output_tokens=678))
        assert await gralora("usage", port=s.port) == ExitCode.OK
        header, *lines = capsys.readouterr().out.splitlines()
        assert await gralora("usage", "--tenant", "acme", "--json", port=s.port) == ExitCode.OK
        (row,) = json.loads(capsys.readouterr().out)["usage"]

    names = [
        "tenant",
        "adapter",
        "requests",
        "prompt tokens",
        "cached tokens",
        "output tokens",
        "refused",
        "upload bytes",
    ]
    assert header.split() == " ".join(names).split()
    assert [line.split() for line in lines] == [
        ["poet", "12", "345", "0", "0", "0", "0"],
        ["acme", "[bold]", "0", "0", "0", "678", "0", "0"],
    ]
    assert row == {
        "tenant": "acme",
        "adapter": "[bold]",
        "requests": 0,
        "prompt_tokens": 0,
        "cached_tokens": 0,
        "output_tokens": 678,
        "refused": 0,
        "upload_bytes": 0,
    }


async def test_a_token_from_the_environment_or_a_file_and_tls(tmp_path: Path, monkeypatch, capsys) -> None:
    secret = "a-token-of-enough-characters"
    tokens = tmp_path / "tokens"
    tokens.write_text(secret)
    tls = TlsConfig(certificate=PEMS / "server.pem", private_key=PEMS / "server.key")
    async with served(auth_token_file=tokens, tls=tls) as s:
        trust = ("--tls-ca", str(PEMS / "ca.pem"))
        assert await gralora("status", *trust, port=s.port) == ExitCode.FAILED
        assert await gralora("status", *trust, "--token-file", str(tokens), port=s.port) == ExitCode.OK
        monkeypatch.setenv("GRALORA_TOKEN", secret)
        assert await gralora("status", *trust, port=s.port) == ExitCode.OK

    assert "UNAUTHENTICATED" in error_line(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["generate", "hi", "--no-such-option"], "--no-such-option"),
        (["generate"], "PROMPT"),
        (["generate", "hi", "--raw", "--system", "x"], "--system needs the chat template"),
        (["generate", "hi", "--regex", "a", "--choice", "a"], "at most one of --json-schema, --regex and --choice"),
        (["generate", "hi", "--json-schema", "/no/such/file"], "cannot read /no/such/file"),
        (["status", "--token-file", "/no/such/file"], "cannot read /no/such/file"),
        (["serve", "--address", "nowhere"], "'nowhere' is not HOST:PORT"),
        (["serve", "--kv-cache-bytes", "lots"], "'lots' is not a size"),
        (["serve", "--model", "x", "--device", "abacus"], "device must be one of auto, cpu, cuda"),
        (["serve", "--tls-cert", "x"], "--tls-cert: tls_cert is given alone"),
        (["serve", "--log-level", "loud"], "--log-level"),
        (["frobnicate"], "frobnicate"),
        (["generate", "hi", "--adapter", "poet=much"], "--adapter poet=much: 'much' is no weight"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_usage_errors_are_one_line_and_exit_code_2(arguments: list[str], complaint: str, capsys) -> None:
    assert run(arguments) == ExitCode.USAGE
    out, err = capsys.readouterr()

    assert out == ""
    assert complaint.lower() in error_line(err).lower()


def test_version(capsys) -> None:
    assert run(["--version"]) == ExitCode.OK
    assert capsys.readouterr().out.startswith("gralora ")


def test_help_documents_the_exit_codes(capsys) -> None:
    assert run(["--help"]) == ExitCode.OK
    words = " ".join(capsys.readouterr().out.split())

    assert "3 no server answers" in words


OFFLINE = [["adapters", command, "--help"] for command in ("convert", "diff", "golden", "inspect", "merge")]


@pytest.mark.parametrize(
    "arguments", [["--help"], ["serve", "--help"], ["adapters", "load", "--help"], *OFFLINE], ids=" ".join
)
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    """A person who asks for help should not wait for torch."""
    code = (
        f"import sys; from gralora_server.cli.app import run; run({arguments!r}); "
        "sys.stderr.write(repr(sorted({'torch', 'transformers', 'grpc', 'numba', 'numpy'} & sys.modules.keys())))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert result.stderr == "[]"
    assert "Usage: gralora" in result.stdout


def test_model_fetch_json_prints_the_path_and_nothing_else(tmp_path: Path, monkeypatch, capsys) -> None:
    def ensure(*, progress, verify: bool) -> Path:
        assert verify
        progress("Converting", 0, None)
        progress("Converting", 1, 2)
        print("from a careless library", file=sys.stderr)
        return tmp_path

    monkeypatch.setattr(model_fetch, "ensure_default_model", ensure)
    assert run(["model", "fetch", "--json"]) == ExitCode.OK
    out, err = capsys.readouterr()

    assert json.loads(out) == {"path": str(tmp_path)}
    assert "Converting" in err


def test_model_fetch_fails_in_one_line(monkeypatch, capsys) -> None:
    def ensure(*, progress, verify: bool) -> Path:
        raise model_fetch.ModelFetchError("run: pip install\nsomething")

    monkeypatch.setattr(model_fetch, "ensure_default_model", ensure)
    assert run(["model", "fetch"]) == ExitCode.FAILED

    assert error_line(capsys.readouterr().err) == "error: run: pip install something"
