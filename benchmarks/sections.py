"""The questions that a run answers, one function each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace

import numpy as np

from benchmarks import fleet
from benchmarks.bench import KV_CACHE_BYTES, Bench
from benchmarks.kernels import KernelStep
from benchmarks.measurement import Contender, by_turns_s
from benchmarks.record import FIRST_LAST, STEP, Ratio, Row, Section
from benchmarks.rivals import generate
from benchmarks.serve import serving
from benchmarks.workload import Request, make_prompts
from gralora_runtime.adapters.residency.shared_inputs import group_siblings
from gralora_runtime.model.adaptable import adaptable_modules, head_name
from gralora_runtime.request import ResponseParams

BASE = "our engine, base model"
ONE = "our engine, 1 adapter"
TRANSFORMERS = "transformers, base model"
GRPC = "gRPC, server and client in their own processes"
HTTP = "HTTP, the same server, a client of its own"
ALONE = 4  # requests that the isolation section repeats alone


def adapters_name(count: int) -> str:
    return f"our engine, {count} adapters" if count > 1 else ONE


def one_request(bench: Bench) -> Section:
    """How near the memory's limit one stream decodes."""
    base, adapter = bench.requests([""], 1), bench.requests(bench.main, 1)
    contenders = [
        bench.ours(BASE, base),
        bench.ours(ONE, adapter),
        Contender(name=TRANSFORMERS, run=lambda _: [generate(bench.base, base)]),
    ]
    rows = bench.measure(contenders)
    return Section(
        key="one",
        title="One request",
        text="Decoding one stream is bound by memory: every step reads all weights, and the adapter's. "
        "The share is that of the read bandwidth which a step reaches.",
        rows=rows,
        ratios=[
            Ratio(title="decode beside transformers", ours=BASE, theirs=TRANSFORMERS, measure=STEP),
            Ratio(title="with an adapter beside base only", ours=ONE, theirs=BASE, measure=STEP),
        ],
    )


def crowd(bench: Bench, vllm_python: str) -> list[Section]:
    """Rivals, and the price of k, measured in the same rounds."""
    workload = bench.workload
    distinct = adapters_name(workload.crowd)
    kinds = {_kind_name(k): names for k, names in bench.by_k.items() if k != workload.k}
    kinds |= {_exact_name(bench, k): names for k, names in bench.exact.items()}
    own = [
        bench.ours(BASE, bench.requests([""], workload.crowd)),
        bench.ours(distinct, bench.requests(bench.by_k[workload.k], workload.crowd)),
        bench.ours(_bfloat16_name(bench), bench.requests(bench.bfloat16, workload.crowd)),
    ]
    own += [bench.ours(name, bench.requests(names, workload.crowd)) for name, names in kinds.items()]
    with ExitStack() as resources:
        contenders = [*own, *fleet.rivals(bench, resources, vllm_python)]
        rows = bench.measure(contenders)
    bench.forget_merged()
    pool_bytes = sum(bench.adapters.bytes[name] for name in bench.by_k[workload.k])
    bench.note_memory(f"{workload.crowd} adapters in our engine's pool", pool_bytes, "their parameters, in float32")
    of_rivals = [row for row in rows if row.contender not in kinds]
    of_kinds = [row for row in rows if row.contender in kinds or row.contender in (BASE, distinct)]
    return [_rivals_section(bench, distinct, of_rivals), _kinds_section(bench, distinct, list(kinds), of_kinds)]


def _rivals_section(bench: Bench, distinct: str, rows: list[Row]) -> Section:
    present = {row.contender for row in rows}
    rivals = [
        fleet.TRANSFORMERS_ONE,
        fleet.TRANSFORMERS_TURNS,
        fleet.OWN_TURNS,
        fleet.PEFT_TURNS,
        fleet.VLLM_ONE,
        fleet.VLLM_EXACT,
    ]
    narrow = _bfloat16_name(bench)
    pairs = [(distinct, BASE), (narrow, BASE), (narrow, distinct), (BASE, fleet.TRANSFORMERS_ONE)]
    pairs += [(distinct, rival) for rival in rivals]
    return Section(
        key="crowd",
        title=f"{bench.workload.crowd} requests for {bench.workload.crowd} customers",
        text="All requests come together. One merged model serves one customer only: it is the best that a deployment "
        "for a single customer does with as many requests. Where models take turns each has one request, so it serves "
        "one at a time; such requests do not influence each other, and a round times as many as its note says: "
        "its time is the mean of theirs, its tokens/s are one request's. Adapters are stored in float32, as PEFT saves "
        "them, but where it says otherwise.",
        rows=rows,
        ratios=[Ratio(title=f"{a} / {b}", ours=a, theirs=b) for a, b in pairs if b in present],
    )


def _kinds_section(bench: Bench, distinct: str, kinds: Sequence[str], rows: list[Row]) -> Section:
    return Section(
        key="kinds",
        title=f"Blocks k, and the exact LoRA of rank k*r ({bench.workload.crowd} requests, as many adapters)",
        text=f"GraLoRA of r={bench.workload.rank} has the same parameters for every k; the LoRA that equals it has k "
        f"times as many. {distinct} is k={bench.workload.k}.",
        rows=rows,
        ratios=[
            Ratio(title=f"{name} / base model", ours=name, theirs=BASE, measure=STEP) for name in (distinct, *kinds)
        ]
        + [
            Ratio(
                title=f"GraLoRA k={k} / {_exact_name(bench, k)}",
                ours=distinct if k == bench.workload.k else _kind_name(k),
                theirs=_exact_name(bench, k),
                measure=STEP,
            )
            for k in bench.exact
        ],
        base=BASE,
    )


def _bfloat16_name(bench: Bench) -> str:
    return f"{adapters_name(bench.workload.crowd)} stored in bfloat16"


def _kind_name(k: int) -> str:
    return f"our engine, k={k}"


def _exact_name(bench: Bench, k: int) -> str:
    return f"our engine, exact LoRA r={k * bench.workload.rank}"


def many_adapters(bench: Bench) -> Section:
    """What a step pays per byte of adapter."""
    count = bench.workload.large_crowd
    max_tokens = bench.workload.large_crowd_tokens
    contenders = [bench.ours(BASE, bench.requests([""], count, max_tokens=max_tokens))]
    contenders += [
        bench.ours(adapters_name(n), bench.requests(bench.main[:n], count, max_tokens=max_tokens))
        for n in bench.workload.distinct
    ]
    rows = bench.measure(contenders)
    return Section(
        key="adapters",
        title=f"Distinct adapters among {count} requests",
        text="The time over base only, per byte of adapter that the step has to read. "
        f"{max_tokens} output tokens each.",
        rows=rows,
        ratios=[Ratio(title=f"{c.name} / base model", ours=c.name, theirs=BASE, measure=STEP) for c in contenders[1:]],
        base=BASE,
    )


def steps(bench: Bench) -> list[Section]:
    """What adapters add to a step, free of the minutes between two runs."""
    workload = bench.workload
    distinct = adapters_name(workload.crowd)
    kinds = {BASE: [""], distinct: bench.by_k[workload.k], _bfloat16_name(bench): bench.bfloat16}
    kinds |= {_kind_name(k): names for k, names in bench.by_k.items() if k != workload.k}
    kinds |= {_exact_name(bench, k): names for k, names in bench.exact.items()}
    counts = {BASE: [""], **{adapters_name(n): bench.main[:n] for n in workload.distinct}}
    pairs = [(name, distinct) for k in bench.by_k if (name := _kind_name(k)) in kinds]
    pairs += [(distinct if k == workload.k else _kind_name(k), _exact_name(bench, k)) for k in bench.exact]
    of_kinds = _steps(bench, kinds, workload.crowd, pairs)
    of_counts = _steps(bench, counts, workload.large_crowd, [])
    return [replace(of_kinds, key="kind-steps"), replace(of_counts, key="adapter-steps")]


def _steps(bench: Bench, adapters: Mapping[str, list[str]], count: int, pairs: Sequence[tuple[str, str]]) -> Section:
    requests = {name: bench.requests(names, count) for name, names in adapters.items()}
    works = {}
    for name, own in requests.items():
        run, works[name] = bench.engine.decode_step(own)
        bench.gate.check(run)
    rows = [
        Row(
            contender=name,
            measure=STEP,
            samples_s=samples_s,
            requests=count,
            tokens=count,
            costs=[bench.cost.decode(requests[name])],
            adapter_bytes=bench.cost.adapter_bytes(requests[name]),
        )
        for name, samples_s in by_turns_s(works, bench.workload.step_samples).items()
    ]
    pairs = [*((name, BASE) for name in adapters if name != BASE), *pairs]
    return Section(
        key="steps",
        title=f"One step of {count} requests, by turns",
        text=f"The forward pass of a step in which all {count} requests decode, repeated: one pass of each contender, "
        "then the next of each. So differences are of one moment, where those of whole runs are of different minutes.",
        rows=rows,
        ratios=[Ratio(title=f"{ours} / {theirs}", ours=ours, theirs=theirs, measure=STEP) for ours, theirs in pairs],
        base=BASE,
    )


def long_prompt(bench: Bench) -> Section:
    """Prefill alone: the time to the first token of one long prompt."""
    prompt = make_prompts(1, bench.workload.long_prompt_tokens, bench.base.config.vocab_size, seed=1)[0]
    base, adapter = Request("", prompt, 1), Request(bench.main[0], prompt, 1)
    rows = bench.measure([bench.ours(BASE, [base]), bench.ours(ONE, [adapter])])
    return Section(
        key="prefill",
        title=f"Prefill of {len(prompt)} tokens",
        text="The floor is the prompt's FLOPs over the GEMM rate; attention is not counted.",
        rows=rows,
        ratios=[Ratio(title="with an adapter beside base only", ours=ONE, theirs=BASE, measure=FIRST_LAST)],
    )


def kernel(bench: Bench) -> Section:
    """The grouped kernel without a model."""
    workload = bench.workload
    head = head_name(bench.base)
    groups = group_siblings([shape for shape, _ in adaptable_modules(bench.base) if shape.name != head])
    shapes = [(group[0].in_features, tuple(module.out_features for module in group)) for group in groups]
    step = KernelStep(shapes, num_adapters=workload.crowd, rank=workload.rank, k=workload.k)

    segment = workload.kernel_segment
    cases = {
        f"{workload.crowd} segments of 1 token": list(range(workload.crowd)),
        f"1 segment of {segment} tokens": [0] * segment,
    }
    rows = [
        Row(
            contender=f"{case}, {way}",
            measure="one pass",
            samples_s=samples_s,
            requests=len(slots),
            tokens=len(slots),
            costs=[step.cost(slots)],
        )
        for case, slots in cases.items()
        for way, samples_s in step.times_s(slots, workload.kernel_samples).items()
    ]
    return Section(
        key="kernel",
        title="The grouped adapter kernel alone",
        text=f"One pass over all {sum(map(len, groups))} modules, r={workload.rank}, k={workload.k}: as one list of "
        "operations, which is how models of Llama's build get it, and in one call for each group of modules that read "
        "the same input, as all others do. The share is that of the read bandwidth, or of the GEMM rate.",
        rows=rows,
    )


def over_wires(bench: Bench) -> Section:
    """What the service costs beside the engine that it drives."""
    requests = bench.requests(bench.by_k[bench.workload.k], bench.workload.crowd)
    in_process = bench.ours(adapters_name(bench.workload.crowd), requests)
    with serving(
        bench.model_dir,
        bench.adapters.folder,
        max_num_seqs=bench.workload.large_crowd,
        adapter_pool_bytes=bench.pool_bytes,
        kv_cache_bytes=KV_CACHE_BYTES,
    ) as service:
        grpc = Contender(name=GRPC, run=lambda _: [service.grpc_client.run(requests)])
        http = Contender(name=HTTP, run=lambda _: [service.http_client.run(requests)])
        rows = bench.measure([in_process, grpc, http])
        memory_bytes = service.server.memory_bytes
        assert memory_bytes is not None  # it has just answered
        bench.note_memory("`gralora serve` with those adapters", memory_bytes, "resident memory of its process")
    return Section(
        key="grpc",
        title=f"{len(requests)} streams through gRPC, and through HTTP",
        text="The real server in one process, a Python client in another, on the same cores; beside it the engine "
        "stepped directly. Steady state is the decode step: all streams run.",
        rows=rows,
        ratios=[
            Ratio(title="gRPC / in process, steady state", ours=GRPC, theirs=in_process.name, measure=STEP),
            Ratio(title="gRPC / in process, whole run", ours=GRPC, theirs=in_process.name),
            Ratio(title="HTTP / in process, steady state", ours=HTTP, theirs=in_process.name, measure=STEP),
            Ratio(title="HTTP / in process, whole run", ours=HTTP, theirs=in_process.name),
        ],
    )


def isolation(bench: Bench) -> dict[str, object]:
    """Whether a request's numbers depend on its neighbours, to the last bit."""
    requests = bench.requests(bench.by_k[bench.workload.k], bench.workload.crowd)
    requests = [replace(request, max_tokens=min(16, request.max_tokens)) for request in requests]
    response = ResponseParams(logprobs=True)
    together = bench.engine.run(requests, response).answers[:ALONE]
    alone = [bench.engine.run([request], response).answers[0] for request in requests[:ALONE]]
    pairs = list(zip(together, alone, strict=True))
    differences = [np.abs(np.subtract(a.logprobs, b.logprobs)).max() for a, b in pairs if a.tokens == b.tokens]
    return {
        "requests": len(pairs),
        "neighbours": len(requests) - 1,
        "same_tokens": sum(a.tokens == b.tokens for a, b in pairs),
        "same_bits": sum(a.tokens == b.tokens and a.logprobs == b.logprobs for a, b in pairs),
        "max_logprob_difference": float(max(differences, default=0.0)),
    }
