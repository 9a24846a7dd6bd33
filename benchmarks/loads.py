"""`python -m benchmarks.loads`: one adapter from a file in the page cache into the pool, phase by phase, and its floor.

The whole is what a client waits for. Below it what the manager's threads do one after the other, and then what packing
consists of, on one thread and each step over all tensors in turn. Together those take longer than packing itself,
which takes one tensor through all of them while it is in a cache.

The floor is the longer of two ways that could overlap: the file's bytes copied once within host memory, by as many
threads as load, and the blob's bytes over the link to the device.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from gralora_kernels.packing import ROW_MAJOR, place_a, place_b
from gralora_runtime.adapters.catalogue.sources.directory import DirectorySource
from gralora_runtime.adapters.checkpoint import loader
from gralora_runtime.adapters.checkpoint.bounds import largest_magnitude
from gralora_runtime.adapters.checkpoint.recipe import recipe_of
from gralora_runtime.adapters.checkpoint.spec import ModuleShape
from gralora_runtime.adapters.checkpoint.stored import ARRAYS, held, read_range
from gralora_runtime.adapters.checkpoint.tensors import WEIGHTS_FILE
from gralora_runtime.adapters.manager import AdapterManager
from gralora_runtime.adapters.residency.pool import AdapterPool
from gralora_runtime.adapters.residency.transfer import COPY_BYTES
from gralora_server.loadtest.synthetic import AdapterKind, make_adapters

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
MAX_WIDTH = 256
PASSES = 5
WHOLE = "request to resident"
Phases = dict[str, list[float]]  # by name: seconds of each pass


@dataclass(frozen=True, slots=True)
class Shape:
    """A model of Llama's build: what its linear layers look like."""

    layers: int
    hidden: int
    kv: int
    intermediate: int

    def modules(self) -> list[ModuleShape]:
        wide, kv, deep = self.hidden, self.kv, self.intermediate
        outs_of = {"self_attn.q_proj": wide, "self_attn.k_proj": kv, "self_attn.v_proj": kv, "self_attn.o_proj": wide}
        outs_of |= {"mlp.gate_proj": deep, "mlp.up_proj": deep, "mlp.down_proj": wide}
        return [
            ModuleShape(f"model.layers.{layer}.{name}", deep if name == "mlp.down_proj" else wide, out)
            for layer in range(self.layers)
            for name, out in outs_of.items()
        ]


SHAPES = {
    "llama-3-8b": Shape(layers=32, hidden=4096, kv=1024, intermediate=14336),
    "smollm2": Shape(layers=30, hidden=576, kv=192, intermediate=1536),
    "tiny": Shape(layers=2, hidden=64, kv=32, intermediate=128),
}


def main() -> None:
    """Measure and print."""
    options = _options()
    result = measure(
        options.shape,
        torch.device(options.device),
        count=options.adapters,
        dtype=options.dtype,
        stored=options.stored,
        helpers=options.helpers,
    )
    if options.json:
        print(json.dumps(result, indent=1))
        return
    print(
        f"{result['shape']}: {result['file_bytes'] / 1e6:.1f} MB of {result['stored']}, {result['modules']} modules, "
        f"into a pool of {result['dtype']} on {result['device']}; medians of {result['adapters']} adapters"
    )
    for name, milliseconds in result["phases_ms"].items():
        print(f"  {name:36} {milliseconds:9.2f} ms")
    print(f"  {WHOLE} is {result['times_floor']:.1f} times the floor")


def measure(
    shape: str,
    device: torch.device,
    *,
    count: int = 5,
    dtype: str = "bfloat16",
    stored: str = "bfloat16",
    helpers: int = 0,
) -> dict[str, Any]:
    """Medians over `count` adapters. `helpers`: also load with that many threads, whatever the device is given."""
    modules, held = SHAPES[shape].modules(), DTYPES[dtype]
    phases: Phases = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        paths = write_adapters(Path(folder), modules, count, DTYPES[stored])
        file_bytes = (paths[0] / WEIGHTS_FILE).stat().st_size
        with _managing(Path(folder) / "adapters", modules, device, held, 2 * file_bytes) as manager:
            floors = _floors(manager.pool, file_bytes, device)
            measure_whole(phases, manager, paths)
            for path in paths:
                measure_threads(phases, manager.pool, path, modules, helpers)
                measure_packing(phases, path, modules, held)
    medians = {name: 1e3 * statistics.median(seconds) for name, seconds in phases.items()} | floors
    return {
        "shape": shape, "device": device.type, "dtype": dtype, "stored": stored, "adapters": count,
        "modules": len(modules), "file_bytes": file_bytes,
        "phases_ms": {name: round(milliseconds, 3) for name, milliseconds in medians.items()},
        "times_floor": round(medians[WHOLE] / max(floors.values()), 2),
    }  # fmt: skip


def write_adapters(folder: Path, modules: Sequence[ModuleShape], count: int, stored: torch.dtype) -> list[Path]:
    """GraLoRA r=16 k=4 on all modules, below `folder`/adapters, in the page cache."""
    model = folder / "model"
    model.mkdir()
    _write_holes(model / "model.safetensors", {f"{m.name}.weight": (m.out_features, m.in_features) for m in modules})
    names = make_adapters(model, folder / "adapters", [AdapterKind(16, 4)], count)
    paths = [folder / "adapters" / name for name in names]
    for path in paths:
        tensors = load_file(path / WEIGHTS_FILE)
        save_file({name: tensor.to(stored) for name, tensor in tensors.items()}, path / WEIGHTS_FILE)
    return paths


def measure_whole(phases: Phases, manager: AdapterManager, paths: Sequence[Path]) -> None:
    """Twice: the first adapter of all finds new threads and memory that was never touched."""
    for path in [*paths, *paths]:
        with _timed(phases, WHOLE):
            manager.load(path.name).result()
        with _timed(phases, "unload: zeroed again"):
            manager.unload(path.name)


def measure_threads(
    phases: Phases, pool: AdapterPool, path: Path, modules: Sequence[ModuleShape], helpers: int
) -> None:
    """What a reader does, then what the placer does, and what it does with an adapter that has to leave."""
    load = partial(loader.load, path.name, path, modules, pool.arena.dtype, max_width=MAX_WIDTH)
    with _timed(phases, "load: file to host memory"):
        adapter = load(spread=pool.spread)
    if helpers:
        with ThreadPoolExecutor(helpers) as threads, _timed(phases, f"the same, {helpers} threads"):
            load(spread=lambda work, items: list(threads.map(work, items)))
    resident = pool.reserve(adapter.layout, 0)
    with _timed(phases, "fill: host memory to pool"):
        pool.fill(resident, adapter)
    with _timed(phases, "read: pool to host memory"):
        pool.read(resident)
    with _timed(phases, "clear: rows and weights to zero"):
        pool.clear(resident)
    pool.release(resident)


def measure_packing(phases: Phases, path: Path, modules: Sequence[ModuleShape], dtype: torch.dtype) -> None:
    """Steps of packing, over all tensors each, and without the memory that packing writes for the first time."""
    with _timed(phases, "  header, plan and layout"):
        header = loader.inspect(path)
        recipe = recipe_of(header.fitting_plan(modules), header.tensors, dtype, keeps_16_bit=ROW_MAJOR.keeps_16_bit)
    matrices = recipe.matrices
    with _timed(phases, "  read"), (path / WEIGHTS_FILE).open("rb") as opened:
        data = [read_range(opened.fileno(), m.stored.begin, m.stored.end) for m in matrices]
    with _timed(phases, "  digest"):
        for own in data:
            hashlib.sha256(own.data).digest()
    values = [own.view(ARRAYS[matrix.stored.dtype]) for matrix, own in zip(matrices, data, strict=True)]
    with _timed(phases, "  finite"):
        for matrix, own in zip(matrices, values, strict=True):
            largest_magnitude(own, matrix.stored.dtype)
    with _timed(phases, "  cast"):
        widened = [held(own, m.stored.dtype, m.dtype) for m, own in zip(matrices, values, strict=True)]
    places = [np.ones_like(own) for own in widened]
    with _timed(phases, "  pack"):
        for matrix, own, place in zip(matrices, widened, places, strict=True):
            (place_a if matrix.is_a else place_b)(place, own.reshape(matrix.stored.shape), ROW_MAJOR.panel)


def _floors(pool: AdapterPool, num_bytes: int, device: torch.device) -> dict[str, float]:
    """Milliseconds, the best of several passes: a floor must not be lower than what is possible."""
    source, target = np.ones(num_bytes, np.uint8), np.ones(num_bytes, np.uint8)

    def copy(start: int) -> None:
        np.copyto(target[start : start + COPY_BYTES], source[start : start + COPY_BYTES])

    floors = {"floor: host memory": 1e3 * _best_s(lambda: pool.spread(copy, range(0, num_bytes, COPY_BYTES)))}
    if device.type == "cuda":
        pinned = torch.ones(num_bytes, dtype=torch.uint8, pin_memory=True)
        there = torch.empty(num_bytes, dtype=torch.uint8, device=device)

        def send() -> None:
            there.copy_(pinned, non_blocking=True)
            torch.cuda.synchronize()

        floors["floor: link"] = 1e3 * _best_s(send)
    return floors


def _best_s(work: Callable[[], object]) -> float:
    seconds: Phases = defaultdict(list)
    for _ in range(PASSES):
        with _timed(seconds, ""):
            work()
    return min(seconds[""])


@contextmanager
def _timed(phases: Phases, name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    phases[name].append(time.perf_counter() - started)


@contextmanager
def _managing(
    folder: Path, modules: Sequence[ModuleShape], device: torch.device, dtype: torch.dtype, pool_bytes: int
) -> Iterator[AdapterManager]:
    """Keeps nothing in host memory: what was unloaded comes from its file again."""
    manager = AdapterManager(
        modules=modules,
        device=device,
        dtype=dtype,
        pool_bytes=pool_bytes * 2,  # float32 of what is stored in 16 bits
        max_slots=4,
        host_cache_bytes=0,
        sources=[DirectorySource(folder)],
        base_model="",
        base_norms={},
        max_width=MAX_WIDTH,
    )
    try:
        yield manager
    finally:
        manager.close()


def _write_holes(path: Path, shapes: Mapping[str, tuple[int, int]]) -> None:
    """A model's header in front of a hole as large as its weights, which takes no disk."""
    ends = list(accumulate((2 * math.prod(shape) for shape in shapes.values()), initial=0))
    tensors = {
        name: {"dtype": "F16", "shape": shape, "data_offsets": offsets}
        for (name, shape), offsets in zip(shapes.items(), pairwise(ends), strict=True)
    }
    header = json.dumps(tensors).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + ends[-1])


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="llama-3-8b")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--adapters", type=int, default=5)
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16", help="of the pool")
    parser.add_argument("--stored", choices=list(DTYPES), default="bfloat16", help="of the files")
    parser.add_argument("--helpers", type=int, default=0, help="also load with so many threads")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser.parse_args()


if __name__ == "__main__":
    main()
