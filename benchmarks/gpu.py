"""The Triton kernels on a GPU: correct first, then each step's time beside the floor that this machine's memory sets.

    PYTHONPATH=scripts python -m benchmarks.gpu [--dtype bfloat16] [--rounds 30] [--out FILE.json]

A step is all projection groups of several layers, enough of them that weights come from memory and not from a cache.
Nothing is timed unless every group agrees with the reference, and a token alone has the bits that it has in its batch.
The floor is the larger of: minimum bytes over the measured read bandwidth, and FLOPs over the measured GEMM rate.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from kernel_bytes import ADAPTERS, MODELS, SEGMENTS, traffic
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.gate import GateRedError
from benchmarks.kernels import lay_out
from benchmarks.machine import facts
from gralora_kernels.dispatch import AdapterBackend, resolve_backend
from gralora_kernels.grouping import Grouping
from gralora_kernels.reference.adapters import ReferenceBackend
from gralora_kernels.replay import ReplayError
from gralora_kernels.tables import GroupTable

BOUNDS = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}  # RMS error over RMS
STEP_BYTES = 512 << 20  # several times any second-level cache
MAX_LAYERS = 32
RESULTS = Path(__file__).resolve().parent / "results"
GroupShape = tuple[int, list[int]]  # in_features, out_features of the modules


@dataclass(frozen=True, slots=True)
class Case:
    """Some layers' groups with an adapter per segment, and the input and output of each group."""

    groups: list[GroupTable]
    arena: Tensor
    grouping: Grouping
    slots: list[int]  # of each token
    inputs: list[Tensor]
    outputs: list[Tensor]

    def run(self, backend: AdapterBackend) -> None:
        """What one step asks of the backend, once it is prepared."""
        for group, x, y in zip(self.groups, self.inputs, self.outputs, strict=True):
            backend.apply(y, x, self.arena, group, self.grouping)


def main() -> None:
    """Check, measure, print and write."""
    options = _options()
    if not torch.cuda.is_available():
        sys.exit("benchmarks.gpu needs a CUDA or ROCm GPU, and torch sees none; `make kernel-audit` needs none")
    device, dtype = torch.device("cuda"), getattr(torch, options.dtype)
    backend = resolve_backend("triton", device)
    bandwidth, gemm_rate = read_bandwidth(device), gemm_flops_per_s(device, dtype)
    rows = []
    for model, shapes in MODELS.items():
        for segments, counts in SEGMENTS.items():
            for adapter, (r, k) in ADAPTERS.items():
                minimum = traffic(model, segments, adapter).minimum * dtype.itemsize // 2
                layers = min(MAX_LAYERS, -(-STEP_BYTES // minimum))
                case = build_case(shapes * layers, counts, r=r, k=k, device=device, dtype=dtype)
                check(case, backend, len(shapes))
                floor_s = max(layers * minimum / bandwidth, flops(case, r) / gemm_rate)
                eager_s, replay_s = time_eager(case, backend, options.rounds), time_replay(case, options.rounds)
                rows.append({
                    "model": model, "step": segments, "adapter": adapter, "layers": layers,
                    "floor_us": round(1e6 * floor_s, 1),
                    "eager_us": round(1e6 * eager_s, 1), "eager_times_floor": round(eager_s / floor_s, 2),
                    "replay_us": None if replay_s is None else round(1e6 * replay_s, 1),
                    "replay_times_floor": None if replay_s is None else round(replay_s / floor_s, 2),
                })  # fmt: skip
    result = {
        "machine": _machine(device),
        "dtype": options.dtype,
        "rounds": options.rounds,
        "read_bandwidth_gb_s": round(bandwidth / 1e9, 1),
        "gemm_tflop_s": round(gemm_rate / 1e12, 2),
        "cases": rows,
    }
    _print(result, rows)
    out = options.out or RESULTS / f"gpu-{options.dtype}.json"
    out.write_text(json.dumps(result, indent=2) + "\n")


def build_case(
    shapes: Sequence[GroupShape], counts: Sequence[int], *, r: int, k: int, device: torch.device, dtype: torch.dtype
) -> Case:
    """Random weights and inputs; segment i has `counts[i]` tokens and an adapter of its own."""
    groups = [GroupTable(in_features, outs, len(counts), device) for in_features, outs in shapes]
    size = lay_out(groups, len(counts), r=r, k=k)
    slots = [slot for slot, count in enumerate(counts) for _ in range(count)]
    grouping = Grouping(len(slots))
    grouping.fill(slots, dict.fromkeys(range(len(counts)), r * k))
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    arena = torch.empty(size, device=device, dtype=dtype).normal_(std=0.1, generator=generator)
    inputs = [random(len(slots), group.in_features) for group in groups]
    outputs = [torch.zeros(len(slots), group.out_features, device=device, dtype=dtype) for group in groups]
    return Case(groups, arena, grouping, slots, inputs, outputs)


def check(case: Case, backend: AdapterBackend, num_groups: int) -> None:
    """Raise `GateRedError` unless the first `num_groups` groups (one layer) are right, and a token's bits its own."""
    backend.prepare(case.groups, case.grouping)
    together = []
    for i, (group, x) in enumerate(zip(case.groups[:num_groups], case.inputs, strict=False)):
        expected, actual = torch.zeros_like(case.outputs[i]), torch.zeros_like(case.outputs[i])
        ReferenceBackend().apply(expected, x, case.arena, group, case.grouping)
        backend.apply(actual, x, case.arena, group, case.grouping)
        error = float((actual.float() - expected.float()).norm() / expected.float().norm())
        if not error <= BOUNDS[case.arena.dtype]:
            raise GateRedError(f"group {i}: RMS error ratio {error:.3g}, limit {BOUNDS[case.arena.dtype]:g}")
        together.append(actual)
    token = len(case.slots) - 1
    alone = Grouping(1)
    alone.fill(case.slots[token:], {case.slots[token]: case.grouping.max_width})
    backend.prepare(case.groups, alone)
    for i, batch in enumerate(together):
        y = torch.zeros_like(batch[token:])
        backend.apply(y, case.inputs[i][token:].clone(), case.arena, case.groups[i], alone)
        if not torch.equal(y[0], batch[token]):
            raise GateRedError(f"group {i}: a token's result depends on its batch")


def flops(case: Case, r: int) -> int:
    """Of both products: the same for every k."""
    features = sum(t.in_features + t.out_features for group in case.groups for t in group.modules)
    return 2 * r * features * len(case.slots)


def time_eager(case: Case, backend: AdapterBackend, rounds: int) -> float:
    """Seconds of a step that launches kernel by kernel; includes its work lists."""

    def step() -> None:
        backend.prepare(case.groups, case.grouping)
        case.run(backend)

    return median_s(step, rounds)


def time_replay(case: Case, rounds: int) -> float | None:
    """Seconds of a step as a CUDA graph; includes its work lists. None for steps of prompts, which no graph is for."""
    from gralora_kernels.triton_ops.adapters.launch import TritonBackend

    backend = TritonBackend(case.arena.device).frozen(
        case.groups, max_tokens=len(case.slots), max_width=case.grouping.max_width, dtype=case.arena.dtype
    )
    try:
        backend.prepare(case.groups, case.grouping)
    except ReplayError:
        return None
    case.run(backend)  # compiled outside of the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        case.run(backend)

    def step() -> None:
        backend.prepare(case.groups, case.grouping)
        graph.replay()

    return median_s(step, rounds)


def median_s(step: Callable[[], object], rounds: int) -> float:
    """By CUDA events, after three rounds of warming up."""
    times = []
    for i in range(rounds + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        step()
        end.record()
        end.synchronize()
        if i >= 3:
            times.append(begin.elapsed_time(end) / 1e3)
    return float(statistics.median(times))


def read_bandwidth(device: torch.device) -> float:
    """Bytes per second of a sum over 1 GiB."""
    data = torch.zeros(1 << 28, device=device)
    return data.numel() * data.element_size() / median_s(lambda: torch.sum(data), 10)


def gemm_flops_per_s(device: torch.device, dtype: torch.dtype) -> float:
    """Of a square product of 8192."""
    size = 8192
    a, b = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / median_s(lambda: torch.mm(a, b), 10)


def _machine(device: torch.device) -> dict[str, object]:
    gpu = {"gpu": torch.cuda.get_device_name(device), "driver_runtime": torch.version.cuda or torch.version.hip}
    return facts() | gpu


def _print(result: dict[str, object], rows: Sequence[dict[str, object]]) -> None:
    title = f"{result['dtype']}: {result['read_bandwidth_gb_s']} GB/s, {result['gemm_tflop_s']} TFLOP/s measured"
    table = Table(*map(str, rows[0]), title=title)
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console(width=160).print(table)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
