"""`python -m benchmarks.weights`: base weights in as many bits as they were saved in, beside the same ones in float32.

Of the default model, whose weights are GGUF's blocks of 4 and 8 bits, and of the same model rounded to bfloat16, as
most checkpoints are. Two engines over a model in one process take turns: decode steps of 1 to 16 rows, and a prompt,
for the base model and for adapters. All tokens are compared. Writes JSON; fails if a gate does.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.catalogue.gate import Gate, show
from benchmarks.machine import busy_share, facts, measure_rates, resident_bytes
from benchmarks.own_engine import OwnEngine
from benchmarks.workload import Request, make_prompts, make_requests
from gralora_runtime.config import AS_SAVED
from gralora_runtime.model.loading import load_as_stored
from gralora_runtime.model.programs.cpu import CpuRunner
from gralora_server.model_fetch import ensure_default_model

RESULTS = Path(__file__).parent / "results"
ADAPTERS = Path(__file__).parent.parent / "examples" / "adapters"
KINDS = (AS_SAVED, "float32")
POOL_BYTES = 256 << 20
KV_BYTES = 256 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    rows: tuple[int, ...] = (1, 2, 4, 16)  # of a decode step
    prompt: int = 64
    tokens: int = 32
    long_prompt: int = 512
    rounds: int = 5
    bandwidth_bytes: int = 1 << 30


QUICK = Plan(rows=(1, 4), prompt=8, tokens=6, long_prompt=32, rounds=1, bandwidth_bytes=1 << 26)


@dataclass(frozen=True, slots=True)
class Case:
    """What is timed: `measure` is "step" or "first token"."""

    name: str
    requests: Sequence[Request]
    measure: str


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.weights", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a minute of it; judges no speed")
    parser.add_argument("--json", type=Path, default=RESULTS / "weights.json", help="where to write the result")
    options = parser.parse_args()
    plan = QUICK if options.quick else Plan()
    options.json.parent.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"machine": facts(), "busy_share_before": busy_share(), "plan": asdict(plan)}
    with tempfile.TemporaryDirectory(prefix="weights-") as folder:
        own = ensure_default_model()
        models = {"blocks of 4 and 8": own, "bfloat16": rounded(own, Path(folder) / "model")}
        measured = {name: measure(plan, name, model) for name, model in models.items()}
    rates = measure_rates(plan.bandwidth_bytes)
    gates = [gate for _, of_model in measured.values() for gate in of_model]
    result |= {
        "models": {name: found for name, (found, _) in measured.items()},
        "read_bytes_per_s": max(rates.read_bytes_per_s.values()),
        "gates": [asdict(gate) | {"passed": gate.passed} for gate in gates],
    }
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    show_times({name: found["ms"] for name, (found, _) in measured.items()})
    show(gates)
    sys.exit(any(not gate.passed for gate in gates if not (options.quick and gate.is_speed)))


def rounded(model: Path, target: Path) -> Path:
    """The same model in bfloat16, with all else that is in its directory."""
    shutil.copytree(model, target, ignore=shutil.ignore_patterns("*.safetensors*"))
    load_as_stored(model).bfloat16().save_pretrained(target)
    return target


def measure(plan: Plan, saved_in: str, model: Path) -> tuple[dict[str, Any], list[Gate]]:
    engines: dict[str, OwnEngine] = {}
    added: dict[str, int] = {}
    weight_bytes: dict[str, int] = {}
    for kind in KINDS:
        before = resident_bytes()
        engines[kind] = OwnEngine(
            model, adapters_dir=ADAPTERS, max_num_seqs=max(plan.rows), adapter_pool_bytes=POOL_BYTES,
            kv_cache_bytes=KV_BYTES, weights=kind,
        )  # fmt: skip
        added[kind] = resident_bytes() - before
        runner = engines[kind].parts.runner
        assert isinstance(runner, CpuRunner), "this is about the CPU's program"
        weight_bytes[kind] = runner.weight_bytes
    times: dict[str, dict[str, list[float]]] = {}
    differing = 0
    try:
        for case in cases(plan, engines[AS_SAVED]):
            own, wrong = _by_turns(engines, case, plan.rounds)
            times[case.name], differing = own, differing + wrong
    finally:
        for engine in engines.values():
            engine.close()
    ratios = {name: statistics.median(_over(own)) for name, own in times.items()}
    found = {
        "ms": {
            name: {kind: [round(1e3 * one, 3) for one in own[kind]] for kind in KINDS} for name, own in times.items()
        },
        "as_saved_over_float32": {name: round(ratio, 4) for name, ratio in ratios.items()},
        "resident_bytes_added": added,
        "weight_bytes": weight_bytes,
    }
    one, prompt = ratios[_step_name(1, "")], ratios["a prompt"]
    sixteen = ratios.get(_step_name(16, "adapters"), 0.0)
    gates = [
        Gate(f"{saved_in}: answers whose tokens differ", float(differing), 0.0),
        Gate(f"{saved_in}: one stream, a step over one in float32", one, 1 / 1.6, is_speed=True),
        Gate(f"{saved_in}: a prompt over one in float32", prompt, 1.03, is_speed=True),
        Gate(f"{saved_in}: 16 customers, a step over one in float32", sixteen, 1.03, is_speed=True),
    ]
    return found, gates


def cases(plan: Plan, engine: OwnEngine) -> list[Case]:
    vocab = engine.parts.info.vocab_size
    names = sorted(folder.name for folder in ADAPTERS.iterdir())
    found = []
    for rows in plan.rows:
        prompts = make_prompts(rows, plan.prompt, vocab)
        for whose, adapters in (("", [""]), ("adapters", names)):
            found.append(Case(_step_name(rows, whose), make_requests(prompts, adapters, plan.tokens), "step"))
    prompt = make_prompts(1, plan.long_prompt, vocab)
    return [*found, Case("a prompt", make_requests(prompt, [""], 2), "first token")]


def _step_name(rows: int, whose: str) -> str:
    return f"a step of {rows}{', ' + whose if whose else ''}"


def _by_turns(engines: Mapping[str, OwnEngine], case: Case, rounds: int) -> tuple[dict[str, list[float]], int]:
    """Seconds of each, and how many answers differ between them."""
    times: dict[str, list[float]] = {kind: [] for kind in engines}
    differing = 0
    for number in range(rounds + 1):
        runs = {kind: engine.run(case.requests) for kind, engine in engines.items()}
        one, other = ([answer.tokens for answer in run.answers] for run in runs.values())
        differing += sum(ours != theirs for ours, theirs in zip(one, other, strict=True))
        for kind, run in runs.items():
            seconds = run.decode_step_s if case.measure == "step" else run.ttft_s[0]
            assert seconds is not None, "no token came between the first and the last"
            if number:  # the first one warms up
                times[kind].append(seconds)
    return times, differing


def _over(own: Mapping[str, Sequence[float]]) -> list[float]:
    return [saved / wide for saved, wide in zip(own[AS_SAVED], own["float32"], strict=True)]


def show_times(models: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]]) -> None:
    table = Table("saved in", "", *(f"{kind}, ms" for kind in KINDS), "ratio")
    for saved_in, times in models.items():
        for name, own in times.items():
            saved, wide = (statistics.median(own[kind]) for kind in KINDS)
            table.add_row(saved_in, name, f"{saved:.2f}", f"{wide:.2f}", f"{saved / wide:.3f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
