"""Decoding speed of this engine beside transformers' own generate, on the same weights and requests, in one process.

    PYTHONPATH=examples python benchmarks/decode.py [--model DIR] [--rows 16] [--rounds 5] [--out FILE.json]

Contenders take turns; each figure is the median of the rounds. Base-model tokens are compared first, and no time is
printed when one differs (but for ties within 1e-3 of a logit); adapters' tokens are the business of tests/e2e. The
floor of a decode step is the larger of: weight bytes over the read bandwidth measured here, and the products' FLOPs
over the fp32 GEMM rate measured here.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from peft_oracle import compare, greedy
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, PreTrainedModel

from gralora_runtime.adapters.lease import AdapterLease
from gralora_runtime.assemble import EngineParts, assemble
from gralora_runtime.config import EngineConfig
from gralora_runtime.detokenizer import Detokenizer
from gralora_runtime.request import ResponseParams, SamplingParams, StoppingParams
from gralora_runtime.sampler import SamplerState
from gralora_runtime.sequence import Sequence as EngineSequence
from gralora_server.model_fetch import ensure_default_model

PROMPT_TOKENS, OUTPUT_TOKENS = 64, 64
EXAMPLES = Path(__file__).parent.parent / "examples" / "adapters"


@dataclass(frozen=True, slots=True)
class Timing:
    """One contender's run: seconds until every prompt was read, and for everything after it."""

    prefill_s: float
    decode_s: float
    tokens: list[list[int]]


def main() -> None:
    """Measure, print and write the result."""
    options = _options()
    model_dir = options.model or ensure_default_model()
    rows: int = options.rows
    parts = assemble(
        EngineConfig(model=model_dir, adapters_dir=EXAMPLES, max_num_seqs=max(rows, 32), enable_prefix_cache=False)
    )
    parts.prepare_thread()
    reference = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    prompts = _prompts(rows, parts.info.vocab_size)
    names = [info.name for info in parts.adapters.list()]
    contenders: dict[str, Callable[[], Timing]] = {
        "transformers generate, base": lambda: time_transformers(reference, prompts),
        "this engine, base": lambda: time_engine(parts, prompts, [""]),
        "this engine, 1 adapter": lambda: time_engine(parts, prompts, names[:1]),
        f"this engine, {len(names)} adapters": lambda: time_engine(parts, prompts, names),
    }
    warm = {name: run() for name, run in contenders.items()}
    check_tokens(warm["this engine, base"].tokens, reference, prompts)
    rounds = [{name: run() for name, run in contenders.items()} for _ in range(options.rounds)]
    result = _summarise(rounds, parts, rows, model_dir)
    _print(result)
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")
    parts.adapters.close()


def time_engine(parts: EngineParts, prompts: Sequence[Sequence[int]], adapters: Sequence[str]) -> Timing:
    """All prompts at once through the engine's own steps; row i asks for adapter i modulo their number."""
    scheduler = parts.engine.scheduler
    tokens: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        lease = parts.adapters.acquire(adapters[index % len(adapters)]).result()
        request_id = f"{time.monotonic_ns()}-{index}"
        tokens[request_id] = []
        scheduler.add(_sequence(parts, request_id, prompt, lease))
    started_s = time.perf_counter()
    prefilled_s = None
    while scheduler.has_work:
        for output in parts.engine.step():
            assert output.delta is not None
            tokens[output.request_id] += output.delta.token_ids
        if prefilled_s is None and all(tokens.values()):
            prefilled_s = time.perf_counter()
    assert prefilled_s is not None
    return Timing(prefilled_s - started_s, time.perf_counter() - prefilled_s, list(tokens.values()))


def time_transformers(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> Timing:
    """The same prompts as one batch of transformers' generate; its prefill is timed by generating one token."""
    ids = torch.tensor([list(prompt) for prompt in prompts])
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    model.generation_config.eos_token_id = None
    started_s = time.perf_counter()
    model.generate(ids, max_new_tokens=1, **settings)
    prefill_s = time.perf_counter() - started_s
    started_s = time.perf_counter()
    out = model.generate(ids, max_new_tokens=OUTPUT_TOKENS, **settings)
    total_s = time.perf_counter() - started_s
    return Timing(prefill_s, total_s - prefill_s, out[:, ids.shape[1] :].tolist())


def _sequence(parts: EngineParts, request_id: str, prompt: Sequence[int], lease: AdapterLease) -> EngineSequence:
    sampling, stopping = SamplingParams(temperature=0.0), StoppingParams(ignore_eos=True)
    state = SamplerState(
        sampling,
        stopping,
        ResponseParams(),
        seed=0,
        prompt_token_ids=prompt,
        eos_token_ids=parts.base.eos_token_ids,
        vocab_size=parts.info.vocab_size,
    )
    return EngineSequence(
        request_id=request_id,
        adapter_name=lease.name,
        tokens=list(prompt),
        num_prompt=len(prompt),
        max_tokens=OUTPUT_TOKENS,
        stopping=stopping,
        eos_token_ids=parts.base.eos_token_ids,
        lease=lease,
        sampler=state,
        detokenizer=Detokenizer(parts.base.tokenizer),
        arrival_s=time.monotonic(),
        seed=0,
    )


def _prompts(count: int, vocab_size: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, vocab_size, (count, PROMPT_TOKENS), generator=generator).tolist()


def check_tokens(served: Sequence[Sequence[int]], model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> None:
    """The gate: every row has transformers' tokens, or parts from them where its own best two logits are a tie."""
    for row, (tokens, prompt) in enumerate(zip(served, prompts, strict=True)):
        verdict = compare(tokens, greedy(model, None, prompt, OUTPUT_TOKENS))
        if not verdict.equal:
            sys.exit(f"row {row} differs from transformers' at token {verdict.first_difference}: no time is reported")


def measure_bandwidth() -> float:
    """Bytes per second that this machine reads, by summing 1 GiB."""
    block = torch.ones(256 << 20, dtype=torch.float32)
    return 4 * len(block) / _best_of(block.sum)


def measure_gemm() -> float:
    """fp32 FLOP per second of a large product."""
    a = torch.randn(1024, 1024)
    return 2 * 1024**3 / _best_of(lambda: a @ a)


def _best_of(work: Callable[[], object], rounds: int = 7) -> float:
    times = []
    for _ in range(rounds):
        started_s = time.perf_counter()
        work()
        times.append(time.perf_counter() - started_s)
    return min(times[1:])


def _summarise(rounds: list[dict[str, Timing]], parts: EngineParts, rows: int, model_dir: Path) -> dict[str, object]:
    bandwidth, gemm = measure_bandwidth(), measure_gemm()
    weight_bytes = (model_dir / "model.safetensors").stat().st_size
    floor_s = max(weight_bytes / bandwidth, rows * weight_bytes / 4 * 2 / gemm)
    table = {}
    for name in rounds[0]:
        steps = [timings[name].decode_s / (OUTPUT_TOKENS - 1) for timings in rounds]
        base = [timings["transformers generate, base"].decode_s for timings in rounds]
        own = [timings[name].decode_s for timings in rounds]
        table[name] = {
            "decode_step_ms": round(1e3 * statistics.median(steps), 2),
            "decode_step_ms_min_max": [round(1e3 * min(steps), 2), round(1e3 * max(steps), 2)],
            "tokens_per_s": round(rows / statistics.median(steps), 1),
            "prefill_s": round(statistics.median(t[name].prefill_s for t in rounds), 3),
            "times_floor": round(statistics.median(steps) / floor_s, 2),
            "times_transformers": round(statistics.median(b / o for b, o in zip(base, own, strict=True)), 2),
        }
    return {
        "workload": {
            "rows": rows,
            "prompt_tokens": PROMPT_TOKENS,
            "output_tokens": OUTPUT_TOKENS,
            "rounds": len(rounds),
        },
        "machine": _machine(),
        "engine": asdict(parts.info),
        "read_bandwidth_gb_s": round(bandwidth / 1e9, 1),
        "gemm_gflop_s": round(gemm / 1e9, 1),
        "decode_step_floor_ms": round(1e3 * floor_s, 2),
        "contenders": table,
    }


def _machine() -> dict[str, object]:
    cpu = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "")
    packages = ("torch", "transformers", "numba", "peft")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "cpu": cpu or platform.processor(),
        "threads": torch.get_num_threads(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
        "commit": commit.stdout.strip(),
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def _print(result: dict[str, object]) -> None:
    console = Console()
    console.print_json(data={key: result[key] for key in ("workload", "machine")})
    table = Table(title=f"decode step; floor {result['decode_step_floor_ms']} ms")
    for column in ("contender", "ms", "tokens/s", "x floor", "x transformers", "prefill s"):
        table.add_column(column)
    contenders = result["contenders"]
    assert isinstance(contenders, dict)
    for name, row in contenders.items():
        keys = ("decode_step_ms", "tokens_per_s", "times_floor", "times_transformers", "prefill_s")
        table.add_row(name, *(str(row[key]) for key in keys))
    console.print(table)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
