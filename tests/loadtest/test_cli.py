"""The commands as a user types them: against the fake server for what they say, and with servers of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.tiny_models import save_tiny_model

from gralora_server.cli.app import run
from gralora_server.cli.output import ExitCode
from gralora_server.loadtest.compare import FLEET, IDEAL, MULTI, OVERHEAD_BYTES, TURNS, model_bytes
from gralora_server.loadtest.headers import shapes_digest
from gralora_server.loadtest.result import LoadTestResult
from gralora_server.loadtest.synthetic import AdapterKind, make_adapters
from gralora_server.loadtest.trace import Trace

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    command = [sys.executable, "-m", "benchmarks.fake_server", "ttft=0.01,itl=0.001", "ttft=0.02"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as server:
        assert server.stdout is not None
        yield server.stdout.readline().strip()
        server.communicate()


def quick(address: str, out: Path, *options: str) -> int:
    short = ["--duration-s", "1", "--warmup-s", "0.2", "--output-tokens", "4", "--prompt-tokens", "8"]
    return run(["loadtest", "--address", address, "--out", str(out), *short, "--arrivals", "poisson:30", *options])


def test_a_run_leaves_result_report_and_plots(address: str, tmp_path: Path, capsys) -> None:
    code = quick(address, tmp_path / "out", "--system", "fake")

    assert code == ExitCode.OK
    result = LoadTestResult.read(tmp_path / "out" / "result.json")
    (done,) = result.runs
    assert done.system == "fake"
    assert done.num_adapters == 2
    assert done.summary.ok == done.summary.requests > 5
    assert result.workload["arrivals"] == "poisson:30"
    assert (tmp_path / "out" / "report.html").is_file()
    assert (tmp_path / "out" / "delays.png").is_file()
    printed = capsys.readouterr().out
    assert "fake" in printed
    assert str(tmp_path / "out" / "report.html") in printed


def test_json_prints_the_result_and_nothing_else(address: str, tmp_path: Path, capsys) -> None:
    quick(address, tmp_path, "--num-adapters", "0", "--json")

    printed = json.loads(capsys.readouterr().out)
    assert printed["runs"][0]["num_adapters"] == 0


def test_a_saved_trace_is_sent_again(address: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"

    quick(address, tmp_path / "a", "--arrivals", "gamma:30,2", "--save-trace", str(trace))
    quick(address, tmp_path / "b", "--trace", str(trace))

    first, second = (LoadTestResult.read(tmp_path / name / "result.json").runs[0] for name in "ab")
    assert first.summary.requests == second.summary.requests
    assert {n: s.requests for n, s in first.summary.adapters.items()} == {
        n: s.requests for n, s in second.summary.adapters.items()
    }
    assert len(Trace.read(trace).requests) >= first.summary.requests


def test_adapters_come_and_go_during_a_run(address: str, tmp_path: Path) -> None:
    quick(address, tmp_path, "--churn-per-s", "20")

    churn = LoadTestResult.read(tmp_path / "result.json").runs[0].churn
    assert churn is not None
    assert churn.unloads > 5
    assert churn.reload_s.count == churn.unloads
    assert churn.failures == {}


def test_tenants_deadlines_and_retries_become_figures(address: str, tmp_path: Path, capsys) -> None:
    tenants = tmp_path / "tenants.toml"
    tenants.write_text('[light]\narrivals = "poisson:10"\n[flood]\narrivals = "step:5,0.4,60,0.3,5,0.3"\n')
    users = ["--tenants", str(tenants), "--deadline-s", "5", "--retries", "2", "--patience-s", "4"]

    code = quick(address, tmp_path / "out", *users)

    assert code == ExitCode.OK
    result = LoadTestResult.read(tmp_path / "out" / "result.json")
    found = result.runs[0].overload
    assert found is not None
    assert (found.deadline_s, found.retries, found.patience_s) == (5, 2, 4)
    assert set(found.tenants) == {"light", "flood"}
    assert found.total.requests == sum(one.requests for one in found.tenants.values())
    assert found.total.in_time + found.total.late == found.total.requests
    assert found.recovery is not None
    assert (found.recovery.from_s, found.recovery.to_s) == (0.4, 0.7)
    assert result.workload["tenant flood"] == "arrivals step:5,0.4,60,0.3,5,0.3"
    assert result.workload["deadline"] == "5 s"
    assert (tmp_path / "out" / "served.png").is_file()
    printed = capsys.readouterr().out
    assert "were in time" in " ".join(printed.split())
    (row,) = (line for line in printed.splitlines() if "flood" in line)
    assert str(found.tenants["flood"].requests) in row


def test_a_saved_trace_knows_its_tenants(address: str, tmp_path: Path) -> None:
    trace, tokens = tmp_path / "trace.jsonl", tmp_path / "tokens"
    tokens.write_text("light abc\nflood def\n")

    quick(address, tmp_path / "a", "--tenants", "light:1,flood:3", "--save-trace", str(trace))
    code = quick(address, tmp_path / "b", "--trace", str(trace), "--tenant-tokens", str(tokens))

    assert code == ExitCode.OK
    first, second = (LoadTestResult.read(tmp_path / name / "result.json").runs[0].overload for name in "ab")
    assert first is not None
    assert second is not None
    assert {n: s.requests for n, s in first.tenants.items()} == {n: s.requests for n, s in second.tenants.items()}


def test_several_results_become_one_report(address: str, tmp_path: Path, capsys) -> None:
    for name in "ab":
        quick(address, tmp_path / name, "--system", name)

    results = [str(tmp_path / name / "result.json") for name in "ab"]
    code = run(["loadtest", "report", *results, "--out", str(tmp_path / "both")])

    assert code == ExitCode.OK
    assert [one.system for one in LoadTestResult.read(tmp_path / "both" / "result.json").runs] == ["a", "b"]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--arrivals", "often"], "arrivals 'often' is not understood"),
        (["--tenants", "light"], "tenants 'light' is not understood"),
        (["--tenants", "a:1,b:1", "--arrivals", "closed:4"], "a closed loop has no rate"),
        (["--tenants", "a:1,b:1,c:1"], "3 tenants without tokens share 2 adapters"),
        (["--tenants", "a:1", "--tenant-tokens", "nowhere"], "the tokens nowhere cannot be read"),
        (["--num-adapters", "3"], "--num-adapters is 3, but the server has 2"),
        (["--warmup-s", "1"], "no request would be counted"),
        (["--trace", "nowhere"], "the trace nowhere cannot be read"),
        (["--churn-per-s", "1", "--num-adapters", "0"], "--churn-per-s needs requests for adapters"),
        (["--model", "x"], "add --start"),
        (["--tls-ca", "nowhere.pem"], "cannot read nowhere.pem"),
        (["--metrics-address", "127.0.0.1:1"], "no metrics page can be read"),
    ],
)
def test_wrong_options_are_one_line(address: str, tmp_path: Path, options: list[str], problem: str, capsys) -> None:
    code = quick(address, tmp_path, *options)

    assert code == ExitCode.USAGE
    assert problem in " ".join(capsys.readouterr().err.split())


def test_no_server_is_exit_code_3(tmp_path: Path, capsys) -> None:
    assert quick("127.0.0.1:1", tmp_path) == ExitCode.UNREACHABLE


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--systems", "multi,best"], "--systems has best"),
        (["--counts", "1,many"], "--counts must be numbers"),
        (["--kinds", "big"], "adapter kind 'big' is not understood"),
    ],
)
def test_wrong_comparisons_are_one_line(tmp_path: Path, options: list[str], problem: str, capsys, monkeypatch) -> None:
    monkeypatch.setenv("GRALORA_CACHE", str(tmp_path / "cache"))
    model = save_tiny_model("llama", tmp_path / "model")

    code = run(["loadtest", "compare", "--model", str(model), "--out", str(tmp_path), *options])

    assert code == ExitCode.USAGE
    assert problem in " ".join(capsys.readouterr().err.split())


def test_a_server_of_its_own_explains_the_figures(tmp_path: Path) -> None:
    """The client's count of tokens and the server's must agree: nothing was cached, nothing was lost."""
    model = save_tiny_model("llama", tmp_path / "model")
    names = make_adapters(model, tmp_path / "adapters", [AdapterKind(4, 2)], 3)
    own = ["--start", "--model", str(model), "--adapters", str(tmp_path / "adapters")]
    load = ["--duration-s", "1.5", "--warmup-s", "0", "--arrivals", "constant:20", "--output-tokens", "5"]

    code = run(["loadtest", "--out", str(tmp_path / "out"), "--prompt-tokens", "16-24", *own, *load])

    assert code == ExitCode.OK
    (done,) = LoadTestResult.read(tmp_path / "out" / "result.json").runs
    server = done.server
    assert server is not None
    assert done.summary.requests == done.summary.ok == 29
    assert set(done.summary.adapters) == set(names)
    assert server.decode_tokens == 29 * 4  # the first of five comes from the prompt
    assert 29 * 16 <= server.prefill_tokens + server.prefix_hit_tokens <= 29 * 24
    assert server.adapter_loads == 3
    assert server.steps > 0
    assert server.phase_s["forward"] > 0
    assert done.memory_bytes
    assert done.memory_bytes > 50_000_000
    assert sum(sample.tokens for sample in done.timeline) == 29 * 5
    sampled = [sample.memory_bytes for sample in done.timeline[:-1]]
    assert sampled
    assert all(memory_bytes is not None and memory_bytes > 50_000_000 for memory_bytes in sampled)
    assert (tmp_path / "out" / "memory.png").is_file()


def test_deployments_are_compared(tmp_path: Path, monkeypatch) -> None:
    """Real servers on a tiny model. The memory holds two merged models: three are refused, or swapped."""
    monkeypatch.setenv("GRALORA_CACHE", str(tmp_path / "cache"))
    model = save_tiny_model("llama", tmp_path / "model")
    kv_cache = 8 << 20
    budget = OVERHEAD_BYTES + kv_cache + 2 * model_bytes(model)
    sizes = ["--memory", str(budget), "--kv-cache", str(kv_cache), "--kinds", "r4k2,r4k1", "--max-num-seqs", "4"]
    # Without a warm-up, in which all that a slow machine sends might be.
    short = ["--duration-s", "1.5", "--warmup-s", "0", "--output-tokens", "4", "--arrivals", "closed:3"]
    short += ["--counts", "3", "--rounds", "2"]

    code = run(["loadtest", "compare", "--model", str(model), "--out", str(tmp_path / "out"), *sizes, *short])

    assert code == ExitCode.OK
    result = LoadTestResult.read(tmp_path / "out" / "result.json")
    assert [one.system for one in result.runs] == [MULTI, FLEET, IDEAL] * 2
    assert len({one.summary.label for one in result.runs}) == 6
    assert [(one.system, one.num_adapters) for one in result.refusals] == [(TURNS, 3)]  # once, not in each round
    assert "3 merged models need" in result.refusals[0].why
    for one in result.runs:
        assert one.summary.errors == {}
        assert one.summary.ok > 0
        assert one.memory_bytes
        assert one.num_adapters == 3
    multi = result.runs[0].server
    assert multi is not None
    assert multi.decode_tokens > 0
    assert multi.adapter_loads == 3
    (folder,) = (tmp_path / "cache" / "loadtest-adapters").glob("*/*")
    assert folder == tmp_path / "cache" / "loadtest-adapters" / shapes_digest(model) / "r4k2-r4k1"
    assert len(list(folder.iterdir())) == 3


def test_warm_servers_have_loaded_before_the_run(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("GRALORA_CACHE", str(tmp_path / "cache"))
    model = save_tiny_model("llama", tmp_path / "model")
    options = ["--counts", "3", "--systems", "multi", "--kinds", "r4k2", "--kv-cache", "8MiB", "--warm"]
    short = ["--duration-s", "1.5", "--warmup-s", "0.5", "--output-tokens", "4", "--arrivals", "closed:3"]

    code = run(["loadtest", "compare", "--model", str(model), "--out", str(tmp_path / "out"), *options, *short])

    assert code == ExitCode.OK
    result = LoadTestResult.read(tmp_path / "out" / "result.json")
    assert result.workload["adapters at the start"] == "in memory, as many as fit"
    (multi,) = result.runs
    assert multi.summary.ok > 0
    assert multi.server is not None
    assert multi.server.decode_tokens > 0
    assert multi.server.adapter_loads == 0
