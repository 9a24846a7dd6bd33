"""Rivals of the crowd: one merged model, a fleet of merged models that take turns, PEFT switching, and vLLM.

Each customer of a fleet has one request, so its models serve one request at a time, whatever runs them. Requests that
come one after another do not influence each other: a round times a few, on other models each time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import vllm_process
from benchmarks.bench import Bench
from benchmarks.machine import resident_bytes
from benchmarks.measurement import Contender, Run
from benchmarks.record import Skipped
from benchmarks.rivals import PeftSwitcher, generate
from benchmarks.worker import WorkerError
from benchmarks.workload import Request

TRANSFORMERS_ONE = "transformers, 1 merged model, one batch"
TRANSFORMERS_TURNS = "transformers, merged models in turn"
OWN_TURNS = "our engine, merged models in turn"
PEFT_TURNS = "PEFT, set_adapter, one by one"
VLLM_ONE = "vLLM, 1 merged model"
VLLM_EXACT = "vLLM, exact LoRAs"


def rivals(bench: Bench, resources: ExitStack, vllm_python: str) -> list[Contender]:
    """Loads all of them; `resources` ends what outlives a call."""
    names = bench.main[: bench.workload.crowd]
    before = resident_bytes()
    models = bench.keep_merged(names)
    bench.note_memory(f"{len(models)} merged models under transformers", resident_bytes() - before)
    same_model = bench.requests(names[:1], bench.workload.crowd)
    distinct = bench.requests(names, bench.workload.crowd)
    count = bench.workload.transformers_turns
    return [
        Contender(name=TRANSFORMERS_ONE, run=lambda _: [generate(models[0], same_model)], merged=True),
        Contender(
            name=TRANSFORMERS_TURNS,
            run=_turns(distinct, count, lambda i: generate(models[i], [distinct[i]])),
            merged=True,
            one_by_one=True,
            note=f"{count} of {len(distinct)} requests a round, {len(models)} models loaded",
        ),
        _own_fleet(bench, distinct, resources),
        _peft(bench, distinct),
        *_vllm(bench, resources, vllm_python),
    ]


def _turns(requests: Sequence[Request], count: int, serve: Callable[[int], Run]) -> Callable[[int], list[Run]]:
    """Round i goes on where round i - 1 ended."""
    return lambda index: [serve((index * count + turn) % len(requests)) for turn in range(count)]


def _own_fleet(bench: Bench, distinct: Sequence[Request], resources: ExitStack) -> Contender:
    served = distinct[: bench.workload.own_fleet]
    folders = [bench.save_merged(request.adapter) for request in served]
    before = resident_bytes()
    engines = [bench.load_engine(folder, adapters_dir=None, max_num_seqs=1) for folder in folders]
    bench.note_memory(f"{len(engines)} merged models under our engine", resident_bytes() - before)
    for engine in engines:
        resources.callback(engine.close)

    def serve(index: int) -> Run:
        request = served[index]
        return as_merged(engines[index].run([replace(request, adapter="")]), [request])

    count = bench.workload.own_turns
    note = f"{count} of {len(distinct)} requests a round, {len(engines)} models loaded"
    return Contender(name=OWN_TURNS, run=_turns(served, count, serve), merged=True, one_by_one=True, note=note)


def _peft(bench: Bench, distinct: Sequence[Request]) -> Contender:
    before = resident_bytes()
    paths = [bench.adapters.path(request.adapter) for request in distinct]
    switcher = PeftSwitcher(deepcopy(bench.base), paths)
    bench.note_memory(f"PEFT with {len(paths)} adapters on one base model", resident_bytes() - before)
    count = bench.workload.peft_turns
    return Contender(
        name=PEFT_TURNS,
        run=_turns(distinct, count, lambda i: switcher.run(distinct[i])),
        one_by_one=True,
        note=f"{count} of {len(distinct)} requests a round, {len(paths)} adapters loaded",
    )


def _vllm(bench: Bench, resources: ExitStack, python: str) -> list[Contender]:
    if reason := vllm_process.why_not(python):
        bench.skipped += [Skipped(contender=name, why=reason) for name in (VLLM_ONE, VLLM_EXACT)]
        return []
    workload, exact = bench.workload, bench.exact[bench.workload.k]
    same_model = bench.requests(bench.main[:1], workload.crowd)
    distinct = bench.requests(exact, workload.crowd)

    def start(model_dir: Path, loras: Sequence[str]) -> Callable[[Sequence[Request]], Run]:
        worker = vllm_process.running(
            python,
            model_dir,
            max_num_seqs=workload.large_crowd,
            max_model_len=workload.prompt_tokens + workload.output_tokens,
            loras={name: bench.adapters.path(name) for name in loras},
            max_lora_rank=workload.rank * workload.k,
            num_threads=torch.get_num_threads(),
        )
        return resources.enter_context(worker).run

    try:
        run_one, run_exact = start(bench.save_merged(bench.main[0]), ()), start(bench.model_dir, exact)
    except WorkerError as death:
        bench.skipped += [Skipped(contender=name, why=str(death)) for name in (VLLM_ONE, VLLM_EXACT)]
        return []
    return [
        Contender(name=VLLM_ONE, run=lambda _: [run_one(same_model)], merged=True, theirs=True),
        Contender(name=VLLM_EXACT, run=lambda _: [run_exact(distinct)], theirs=True),
    ]


def as_merged(run: Run, requests: Sequence[Request]) -> Run:
    """What a merged model answered to no adapter, as answers of the adapter that is merged into it."""
    return Run(tuple(replace(answer, request=request) for answer, request in zip(run.answers, requests, strict=True)))
