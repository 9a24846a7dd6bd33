"""A real server of a tiny model is measured, planned for, and sent what was planned."""

from __future__ import annotations

import json
import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from support.checkpoints import write_lora
from support.peft_adapters import gralora_config, lora_config
from support.workspaces import save_workspace

from gralora_runtime.errors import AdapterRejectedError, ConfigError
from gralora_server.cli.app import run
from gralora_server.cli.environment import offline_environment
from gralora_server.cli.output import ExitCode
from gralora_server.client import Client
from gralora_server.loadtest.local_server import running
from gralora_server.loadtest.record import RequestRecord
from gralora_server.loadtest.result import LoadTestResult
from gralora_server.planner.check import Check
from gralora_server.planner.measure import Subject, measure
from gralora_server.planner.mix import adapter_bytes, applied_to_any_prompt, kv_token_bytes
from gralora_server.planner.profile import Profile
from gralora_server.planner.waves import steady_gaps_s

from .profiles import profile as made_up
from .test_search import PLANNER, trace

NAMES = ("g", "hybrid", "lora")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    configs = [gralora_config("llama", 8, 2), gralora_config("llama", 8, 2, hybrid_r=2), lora_config("llama", 5)]
    return save_workspace(tmp_path_factory.mktemp("plan"), dict(zip(NAMES, configs, strict=True)))


@pytest.fixture(scope="module")
def profile(workspace: Path) -> Profile:
    return measure(
        Subject(
            model=workspace / "model",
            adapters=workspace / "adapters",
            adapter_bytes=adapter_bytes(workspace / "model", workspace / "adapters", NAMES),
            described="three",
            settings={"max_num_seqs": 4, "max_num_batched_tokens": 64, "page_size": 16},
            kv_token_bytes=kv_token_bytes(workspace / "model"),
            environment=offline_environment(),
        )
    )


def test_headers_say_what_the_server_says(workspace: Path) -> None:
    arguments = ["serve", "--address", "127.0.0.1:0", "--model", str(workspace / "model"), "--log-level", "error"]
    with running([*arguments, "--adapters", str(workspace / "adapters")], offline_environment()) as server:  # noqa: SIM117
        with Client(server.address) as client:
            served = {adapter.name: adapter.pool_bytes for adapter in client.adapters.list()}

    assert adapter_bytes(workspace / "model", workspace / "adapters", NAMES) == served


def test_an_adapter_that_does_not_fit_is_refused(workspace: Path, tmp_path: Path) -> None:
    config = json.loads((workspace / "adapters" / "g" / "adapter_config.json").read_text())
    (tmp_path / "g").mkdir()
    (tmp_path / "g" / "adapter_config.json").write_text(json.dumps(config | {"r": 4}))
    weights = (workspace / "adapters" / "g" / "adapter_model.safetensors").read_bytes()
    (tmp_path / "g" / "adapter_model.safetensors").write_bytes(weights)

    with pytest.raises(AdapterRejectedError, match="shape"):
        adapter_bytes(workspace / "model", tmp_path, ["g"])


def test_what_drawn_prompts_do_not_invoke_is_not_measured(tmp_path: Path) -> None:
    write_lora(tmp_path / "a", alora_invocation_tokens=[5, 6])
    write_lora(tmp_path / "b")

    assert applied_to_any_prompt(tmp_path, ["a", "b"]) == ["b"]
    with pytest.raises(ConfigError, match=r"all adapters of .* have alora_invocation_tokens"):
        applied_to_any_prompt(tmp_path, ["a"])


def test_a_measured_profile_has_every_cost(profile: Profile) -> None:
    assert [point.tokens for point in profile.step_s] == [1, 2, 4, 8, 16, 32, 64]
    assert all(0 < point.seconds < 1 for point in profile.step_s)
    assert 0 < profile.load_byte_s < 1e-3
    assert profile.server_bytes > 100_000_000  # torch alone is that large
    assert profile.machine["cores"].isdigit()


def test_a_check_sends_what_was_simulated(workspace: Path, profile: Profile) -> None:
    planner = replace(PLANNER, profile=profile, memory_bytes=8 << 30, host_cache_bytes=64 << 20)
    check = Check(
        planner=planner,
        model=workspace / "model",
        adapters=workspace / "adapters",
        environment=offline_environment(),
        progress=lambda *_: nullcontext(lambda _: None),
    )
    sizes = adapter_bytes(workspace / "model", workspace / "adapters", NAMES)

    done = check.run("checked", sizes, trace(list(sizes), 20.0, 0.5, 2.0))

    assert done.predicted is not None
    assert done.predicted.summary.requests == done.summary.requests == done.summary.ok > 20
    assert done.predicted.summary.tokens == pytest.approx(done.summary.tokens, rel=0.5)
    assert done.memory_bytes is not None
    assert done.predicted.memory_bytes == pytest.approx(done.memory_bytes, rel=0.5)
    assert done.server is not None
    assert done.server.adapter_loads == len(NAMES)


@pytest.fixture
def command(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A plan from a profile that was made up, for this model."""
    monkeypatch.setenv("GRALORA_CACHE", str(tmp_path / "cache"))
    made_up(model="model", kv_token_bytes=kv_token_bytes(workspace / "model")).write(tmp_path / "profile.json")
    options = ["--model", str(workspace / "model"), "--adapters", str(workspace / "adapters"), "--kinds", "r8k2"]
    options += ["--profile", str(tmp_path / "profile.json"), "--max-num-seqs", "4", "--prompt-tokens", "20"]
    return ["plan", *options, "--output-tokens", "8", "--memory", "8GiB"]


def test_the_command_says_what_fits(command: list[str], workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*command, "--counts", "3,30", "--rate-per-adapter", "0.5", "--json"]) == ExitCode.OK

    said = json.loads(capsys.readouterr().out)
    sizes = adapter_bytes(workspace / "model", workspace / "adapters", NAMES)
    assert [plan["num_adapters"] for plan in said["plans"]] == [3, 30]
    assert [plan["adapter_pool_bytes"] for plan in said["plans"]] == [sum(sizes.values()), 10 * sum(sizes.values())]
    assert 10 < said["plans"][0]["requests_per_s"] < 100
    assert said["most_adapters"]["requests_per_s"] == pytest.approx(said["most_adapters"]["num_adapters"] * 0.5)
    assert "--adapter-pool-bytes" in said["plans"][0]["serve"]


def test_the_command_prints_a_table_and_how_to_serve(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*command, "--counts", "3", "--rate-per-adapter", "1000"]) == ExitCode.OK

    printed = capsys.readouterr().out
    assert "made-up" not in printed
    assert "At 1000 requests a second for each adapter none fits" in printed
    assert re.search(r"gralora serve --max-num-seqs 4 .*--adapter-pool-bytes \d+", printed)


def test_a_check_leaves_a_report_with_its_errors(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from gralora_server.cli import plan

    monkeypatch.setattr(plan, "CHECK_S", 2.0)
    monkeypatch.setattr(plan, "CHECK_WARMUP_S", 0.5)

    assert run([*command, "--counts", "2,3", "--check", "--json", "--out", str(tmp_path / "out")]) == ExitCode.OK

    said = json.loads(capsys.readouterr().out)  # and nothing else
    assert [check["num_adapters"] for check in said["checks"]] == [2, 3, 3]
    result = LoadTestResult.read(tmp_path / "out" / "result.json")
    assert [run.num_adapters for run in result.runs] == [2, 3, 3]
    assert all(run.predicted is not None and not run.summary.errors for run in result.runs)
    assert "Prediction and measurement" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--max-num-seqs", "8"], "is of model with max_num_seqs 4, not of model with 8"),
        (["--counts", "0"], "--counts must be numbers"),
        (["--arrivals", "gamma"], "arrivals 'gamma:"),
        (["--memory", "1KiB"], "the memory is 1024 bytes"),
        (["--adapters", "nowhere"], "there are no adapters in 'nowhere'"),
        (["--kinds", "r7k2"], "adapter kind 'r7k2' is not understood"),
    ],
)
def test_what_cannot_be_planned_is_one_line(
    command: list[str], options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*command, *options]) == ExitCode.USAGE

    error = capsys.readouterr().err
    assert words in " ".join(error.split())
    assert error.count("\n") == 1


def record(*times_s: float) -> RequestRecord:
    return RequestRecord(
        adapter="", intended_s=0.0, sent_s=0.0, token_times_s=times_s, finished_s=times_s[-1], status="OK", counted=True
    )


def test_steps_count_while_all_requests_run() -> None:
    early, late = record(1.0, 2.0, 3.0, 4.0), record(2.5, 3.5, 4.5)

    assert steady_gaps_s([early, late]) == [1.0, 1.0]
    assert steady_gaps_s([record(1.0, 2.0), record(3.0, 4.0)]) == []
