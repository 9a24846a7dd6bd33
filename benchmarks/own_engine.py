"""This project's engine, stepped directly: no server, no event loop, no other thread."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

from benchmarks.measurement import Answer, Run
from benchmarks.sequences import make_sequence
from benchmarks.workload import Request
from gralora_runtime.adapters.residency.lease import AdapterLease
from gralora_runtime.assemble import assemble
from gralora_runtime.config import AS_SAVED, EngineConfig, in_directory
from gralora_runtime.detokenizer import Detokenizer
from gralora_runtime.request import Delta, ResponseParams
from gralora_runtime.scheduling.sequence import Sequence as EngineSequence

Deltas = dict[str, list[tuple[float, Delta]]]  # by request, with when each came


class OwnEngine:
    """One model and the adapters of one directory. The prefix cache is off: repeated prompts are to be computed."""

    def __init__(
        self,
        model_dir: Path,
        *,
        adapters_dir: Path | None = None,
        max_num_seqs: int,
        adapter_pool_bytes: int,
        kv_cache_bytes: int,
        weights: str = AS_SAVED,
    ) -> None:
        config = EngineConfig(
            model=model_dir,
            adapters=in_directory(adapters_dir),
            max_num_seqs=max_num_seqs,
            adapter_pool_bytes=adapter_pool_bytes,
            kv_cache_bytes=kv_cache_bytes,
            weights=weights,
            enable_prefix_cache=False,
        )
        self.parts = assemble(config)
        self.parts.prepare_thread()
        self._ids = itertools.count()

    def run(self, requests: Sequence[Request], response: ResponseParams | None = None) -> Run:
        """All requests arrive together, their adapters in the pool."""
        sequences, deltas = self._arrive(requests, response or ResponseParams())
        started_s = time.perf_counter()
        while self.parts.engine.scheduler.has_work:
            self._step(deltas, started_s)
        return Run(tuple(answer(request, deltas[i]) for request, i in zip(requests, sequences, strict=True)))

    def decode_step(self, requests: Sequence[Request]) -> tuple[Run, Callable[[], None]]:
        """The forward pass of a step in which all requests decode, to be repeated; and every token up to that step's.

        The requests are gone by then and their pages with others, so a repeated pass reads keys and values of others:
        as many, which is what its time depends on. Their adapters must stay in the pool.
        """
        engine = self.parts.engine
        sequences, deltas = self._arrive(requests, ResponseParams())
        while not all(sequence.num_output for sequence in sequences.values()):
            self._step(deltas, time.perf_counter())
        plan = engine.scheduler.plan()
        assert plan is not None, "requests ended before all of them decoded"
        built = engine.batch.build(plan)
        tensors = replace(built, grouping=deepcopy(built.grouping))  # the builder fills its own anew
        best = self.parts.runner.execute(tensors).argmax(dim=-1).tolist()
        last = dict(zip((row.request_id for row in plan.rows), best, strict=True))
        answers = []
        for request, (request_id, sequence) in zip(requests, sequences.items(), strict=True):
            tokens = (*sequence.tokens[sequence.num_prompt :], last[request_id])
            answers.append(Answer(replace(request, max_tokens=len(tokens)), tokens, times_s=()))
        engine.scheduler.abandon_all()

        def forward() -> None:
            self.parts.runner.execute(tensors)

        return Run(tuple(answers)), forward

    def _arrive(
        self, requests: Sequence[Request], response: ResponseParams
    ) -> tuple[dict[str, EngineSequence], Deltas]:
        """All requests at once, their adapters in the pool."""
        leases = [self.parts.adapters.acquire(request.adapter).result() for request in requests]
        sequences = {
            sequence.request_id: sequence
            for sequence in (
                self._sequence(request, lease, response) for request, lease in zip(requests, leases, strict=True)
            )
        }
        for sequence in sequences.values():
            self.parts.engine.scheduler.add(sequence)
        return sequences, {request_id: [] for request_id in sequences}

    def _step(self, deltas: Deltas, started_s: float) -> None:
        outputs = self.parts.engine.step()
        now_s = time.perf_counter() - started_s
        for output in outputs:
            if output.delta is None:
                raise RuntimeError(f"a request failed: {output.error}") from output.error
            deltas[output.request_id].append((now_s, output.delta))

    def close(self) -> None:
        """End the threads that load adapters."""
        self.parts.adapters.close()

    def _sequence(self, request: Request, lease: AdapterLease, response: ResponseParams) -> EngineSequence:
        base = self.parts.base
        return make_sequence(
            f"bench-{next(self._ids)}",
            list(request.prompt),
            lease,
            max_tokens=request.max_tokens,
            vocab_size=self.parts.info.vocab_size,
            eos_token_ids=base.eos_token_ids,
            response=response,
            detokenizer=Detokenizer(base.tokenizer),
        )


def answer(request: Request, deltas: Sequence[tuple[float, Delta]]) -> Answer:
    """The deltas of one request, with when each came."""
    tokens = [(token, time_s) for time_s, delta in deltas for token in delta.token_ids]
    return Answer(
        request=request,
        tokens=tuple(token for token, _ in tokens),
        times_s=tuple(time_s for _, time_s in tokens),
        logprobs=tuple(token.logprob for _, delta in deltas for token in delta.logprobs),
    )
