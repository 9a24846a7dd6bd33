"""`gralora serve`: its options become configurations, and its process announces itself and ends as it should."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gralora_runtime.config import AdapterSource, EngineConfig
from gralora_runtime.scheduling.fairness import Prices
from gralora_server import supervisor
from gralora_server.cli import serve
from gralora_server.cli.app import run
from gralora_server.cli.output import ExitCode
from gralora_server.client import Client
from gralora_server.config import HttpConfig, MetricsConfig, ServerConfig, TlsConfig, TracingConfig
from gralora_server.planner.profile import Profile, StepPoint
from gralora_server.settings.table import SETTINGS
from gralora_server.settings.values import parse_address, parse_bytes, parse_graphs

# A full step of prompts takes 0.16 s a token, one of 4 rows 0.2 s; loading makes steps half as long again.
PROFILE = Profile(
    model="m", made_at="2026-11-30", machine={}, adapters="none",
    settings={"max_num_seqs": 4, "max_num_batched_tokens": 10, "page_size": 16},
    step_s=(StepPoint(tokens=4, seconds=0.8), StepPoint(tokens=10, seconds=1.6)),
    adapter_byte_s=0.0, adapter_token_byte_s=0.0, context_token_s=0.0, prefill_context_s=0.0, request_s=0.0,
    load_byte_s=1.0, load_slowdown=0.5, server_bytes=1, kv_token_bytes=1,
)  # fmt: skip


@pytest.fixture
def configured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[ServerConfig, EngineConfig, bool]]:
    """What `serve` would run with."""
    seen: list[tuple[ServerConfig, EngineConfig, bool]] = []
    monkeypatch.setattr(
        serve, "_run", lambda server, engine, _reloader, *, as_json: seen.append((server, engine, as_json))
    )
    monkeypatch.setattr(serve, "configure", lambda _level, _format: None)
    return seen


def test_without_options_the_configurations_are_the_defaults(configured, monkeypatch) -> None:
    monkeypatch.setattr(serve, "default_model", lambda: Path("/default"))
    assert run(["serve"]) == ExitCode.OK

    assert configured == [(ServerConfig(), EngineConfig(model=Path("/default")), False)]


def test_every_option_reaches_its_configuration(configured, tmp_path: Path) -> None:
    profile = tmp_path / "profile.json"
    PROFILE.write(profile)
    options = {
        "--model": "/m", "--adapters": "/a,hold", "--address": "0.0.0.0:0", "--device": "cpu",
        "--dtype": "bfloat16", "--weights": "float32",
        "--kernel-backend": "reference", "--threads": "3", "--max-num-seqs": "5", "--max-num-batched-tokens": "7",
        "--max-model-len": "11", "--max-queue": "13", "--max-queue-tokens": "59", "--profile": str(profile),
        "--max-adapter-rank": "17", "--max-added-tokens": "73", "--max-adapter-slots": "19",
        "--page-size": "23", "--kv-cache-bytes": "1GiB", "--adapter-pool-bytes": "2m", "--host-cache-bytes": "29",
        "--token-file": "/t", "--tls-cert": "/c", "--tls-key": "/k", "--tls-client-ca": "/ca",
        "--allow-root": "/r", "--allow-unknown-config-key": "stamp", "--state-dir": "/s", "--copies-bytes": "3k",
        "--keep-versions": "3", "--keep-versions-days": "1.5", "--download-bytes": "4k",
        "--hub-endpoint": "http://h", "--hub-token": "t", "--s3-endpoint": "http://s", "--watch": "poll",
        "--cuda-graphs": "4,2,4", "--pipeline": "on",
        "--max-request-s": "31", "--grace-s": "37", "--metrics-address": "[::1]:41", "--metrics-max-adapters": "43",
        "--http-address": "127.0.0.1:67", "--ui-address": "127.0.0.1:71",
        "--upload-bytes": "5k", "--load-share": "0.5", "--max-message-bytes": "6k", "--write-timeout-s": "47",
        "--max-connection-age-s": "53", "--log-level": "debug", "--first-token-s": "0.5",
        "--step-timeout-s": "61", "--log-format": "json", "--explain-requests": "71",
        "--otlp-endpoint": "http://o:73", "--trace-sampling": "0.25",
    }  # fmt: skip
    switches = {"--prefix-cache", "--batch-invariant", "--allow-archives", "--reflection", "--supervise"}
    switches |= {"--kserve", "--vllm-grpc"}
    assert options.keys() | switches == {setting.option for setting in SETTINGS}
    words = [word for pair in options.items() for word in pair] + ["--adapters", "/b"]
    set_otherwise = ["--no-prefix-cache", "--batch-invariant", "--allow-archives", "--no-reflection", "--kserve"]
    set_otherwise.append("--vllm-grpc")
    assert run(["serve", *words, *set_otherwise, "--json"]) == ExitCode.OK
    ((server, engine, as_json),) = configured

    assert server == ServerConfig(
        host="0.0.0.0",
        port=0,
        tls=TlsConfig(certificate=Path("/c"), private_key=Path("/k"), client_ca=Path("/ca")),
        auth_token_file=Path("/t"),
        metrics=MetricsConfig(host="::1", port=41),
        http=HttpConfig(host="127.0.0.1", port=67),
        tracing=TracingConfig(endpoint="http://o:73", sampling=0.25),
        ui=HttpConfig(host="127.0.0.1", port=71),
        state_dir=Path("/s"),
        kserve=True,
        vllm_grpc=True,
        model_dir=Path("/m"),
        reflection=False,
        max_request_s=31.0,
        drain_grace_s=37.0,
        max_message_bytes=6144,
        write_timeout_s=47.0,
        step_timeout_s=61.0,
        max_connection_age_s=53.0,
    )
    assert engine == EngineConfig(
        model=Path("/m"),
        adapters=(AdapterSource("/a", follows=False), AdapterSource("/b")),
        allow_roots=(Path("/r"),),
        allow_unknown_config_keys=("stamp",),
        state_dir=Path("/s"),
        keep_versions=3,
        keep_versions_days=1.5,
        copies_bytes=3072,
        download_bytes=4096,
        upload_bytes=5120,
        load_share=0.5,
        hub_endpoint="http://h",
        hub_token="t",
        s3_endpoint="http://s",
        allow_archives=True,
        watch="poll",
        device="cpu",
        dtype="bfloat16",
        weights="float32",
        kernel_backend="reference",
        max_num_seqs=5,
        max_num_batched_tokens=7,
        max_model_len=11,
        max_queue=13,
        max_queue_tokens=59,
        first_token_s=0.5,
        prices=Prices(output_token=1.25, adapter_byte=3.125),
        page_size=23,
        kv_cache_bytes=1 << 30,
        adapter_pool_bytes=2 << 20,
        max_adapter_slots=19,
        host_cache_bytes=29,
        max_adapter_rank=17,
        max_added_tokens=73,
        enable_prefix_cache=False,
        num_threads=3,
        pipeline="on",
        cuda_graphs=(2, 4),
        batch_invariant=True,
        max_named_adapters=43,
        max_explained_requests=71,
    )
    assert as_json


def test_supervised_it_is_the_same_command_in_a_child_with_the_ports_that_the_parent_keeps(
    configured, monkeypatch
) -> None:
    commands: list[list[str]] = []

    async def supervise(config: ServerConfig, command: Callable[[ServerConfig], list[str]], **told: Any) -> int:
        assert config.http is not None
        commands.append(command(replace(config, port=7, http=replace(config.http, port=8))))
        assert told["hopeless"] == ExitCode.USAGE
        assert told["settings"]().settings.server.supervise
        return 3

    monkeypatch.setattr(supervisor, "supervise", supervise)
    words = ["serve", "--model", "/m", "--address", "[::1]:0", "--http-address", "[::1]:0", "--supervise", "--json"]
    monkeypatch.setattr(sys, "argv", ["gralora", *words])
    assert run() == 3

    ((executable, _, program, *arguments),) = commands
    assert (executable, program) == (sys.executable, serve.MAIN)
    assert run(arguments) == ExitCode.OK
    expected = ServerConfig(host="[::1]", port=7, http=HttpConfig(host="[::1]", port=8), supervised=True)
    assert configured == [(expected, EngineConfig(model=Path("/m")), True)]


@pytest.mark.parametrize(
    ("text", "expected"), [("7", 7), ("1k", 1024), ("512MiB", 512 << 20), ("1.5 GB", 3 << 29), ("2T", 2 << 40)]
)
def test_sizes(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


def test_a_size_that_is_more_than_any_is_refused() -> None:
    with pytest.raises(ValueError, match="more than any size"):
        parse_bytes("9" * 400)


@pytest.mark.parametrize(("text", "expected"), [("on", None), ("off", ()), ("1", (1,)), ("8, 2,4", (2, 4, 8))])
def test_graphs(text: str, expected: tuple[int, ...] | None) -> None:
    assert parse_graphs(text) == expected


@pytest.mark.parametrize("text", ["", "some", "1,,2", "1.5"])
def test_other_words_for_graphs_are_refused_by_name(text: str) -> None:
    with pytest.raises(ValueError, match="is not on, off or numbers of rows"):
        parse_graphs(text)


@pytest.mark.parametrize(
    ("text", "expected"), [("a:1", ("a", 1)), ("[::1]:2", ("[::1]", 2)), ("0.0.0.0:0", ("0.0.0.0", 0))]
)
def test_addresses(text: str, expected: tuple[str, int]) -> None:
    assert parse_address(text) == expected


PROGRAM = """
import sys
sys.path[:0] = {path!r}
from support.fake_engine import FakeEngine
import gralora_server.cli.serve as serve

async def start(config, stage):
    return FakeEngine()

serve._start_engine = start
from gralora_server.cli import main
sys.argv = ["gralora", "serve", "--model", "/m", "--address", "127.0.0.1:0", *sys.argv[1:]]
main()
"""


def started(*options: str) -> subprocess.Popen[str]:
    """The command in a process of its own, with an engine that needs no model."""
    program = PROGRAM.format(path=sys.path)
    return subprocess.Popen(
        [sys.executable, "-c", program, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_it_says_where_it_serves_and_ends_cleanly_on_sigterm() -> None:
    with started() as process:
        line = process.stdout.readline()
        assert line.startswith("SERVING on 127.0.0.1:")
        with Client(line.split()[-1]) as client:
            client.wait_ready(10)
            assert client.info().model == "fake"
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=20)

    assert process.returncode == ExitCode.OK
    assert out == ""
    assert "draining" in err
    assert "Traceback" not in err


def test_on_sighup_it_reads_its_file_again_and_keeps_what_it_has_if_that_is_wrong(tmp_path: Path) -> None:
    file = tmp_path / "gralora.toml"
    file.write_text("[tenants.acme]\n")
    with started("--config", str(file)) as process:
        process.stdout.readline()
        file.write_text("[tenants.acme]\nweight = -1\n")
        process.send_signal(signal.SIGHUP)
        refused = next(line for line in process.stderr if "not reloaded" in line)
        file.write_text("[tenants.acme]\nweight = 2\n")
        process.send_signal(signal.SIGHUP)
        reloaded = next(line for line in process.stderr if "was reloaded" in line)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=20)

    assert f"{file}:2: tenants.acme.weight should be greater than 0, got -1" in refused
    assert reloaded.endswith("changed: tenants\n")
    assert process.returncode == ExitCode.OK


def test_with_json_it_says_so_in_json_and_obeys_ctrl_c() -> None:
    with started("--json") as process:
        document = json.loads(process.stdout.readline())
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=20)

    assert document["model"] == "/m"
    assert document["address"].startswith("127.0.0.1:")
    assert process.returncode == ExitCode.OK


def test_an_address_in_use_is_one_line(tmp_path: Path) -> None:
    with started() as first:
        address = first.stdout.readline().split()[-1]
        with started("--address", address) as second:
            _, err = second.communicate(timeout=20)
        first.terminate()
        first.communicate(timeout=20)

    assert second.returncode == ExitCode.USAGE
    assert f"error: cannot listen on {address}" in err.splitlines()[-1]
    assert "Traceback" not in err
