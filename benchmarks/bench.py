"""What all sections share: the base model, the adapters, our engine and the gate; and what they found on the way."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.adapters import AdapterSet, Merger
from benchmarks.cost import ModelCost
from benchmarks.gate import Gate, GateRedError
from benchmarks.machine import resident_bytes
from benchmarks.measurement import Contender, interleave
from benchmarks.own_engine import OwnEngine
from benchmarks.record import Memory, Row, Skipped, rows_of
from benchmarks.worker import WorkerError
from benchmarks.workload import Request, Workload, make_prompts, make_requests

KV_CACHE_BYTES = 512 << 20  # more than the largest crowd needs


class Bench:
    """Made once per run, in `folder`, which is the caller's to delete."""

    def __init__(self, model_dir: Path, folder: Path, workload: Workload) -> None:
        self.model_dir = model_dir
        self.folder = folder
        self.workload = workload
        self.memory: list[Memory] = []
        self.skipped: list[Skipped] = []
        self.base: PreTrainedModel = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
        self.adapters = AdapterSet(folder / "adapters")
        self.main = self.adapters.add_gralora(self.base, workload.num_adapters, rank=workload.rank, k=workload.k)
        self.by_k = {workload.k: self.main[: workload.crowd]}
        for k in workload.other_k:
            self.by_k[k] = self.adapters.add_gralora(self.base, workload.crowd, rank=workload.rank, k=k)
        self.exact = {k: self.adapters.add_exact_lora(self.by_k[k]) for k in (workload.k, 4)}
        self.bfloat16 = self.adapters.add_bfloat16(self.by_k[workload.k])
        self.merger = Merger(self.base)
        self.kept: dict[str, PreTrainedModel] = {}  # merged models that take part themselves
        self.gate = Gate(self._reference, self.adapters.same_as)
        self.cost = ModelCost.of(self.base, self.adapters.params, self.adapters.bytes)
        self.prompts = make_prompts(workload.large_crowd, workload.prompt_tokens, self.base.config.vocab_size)
        self.pool_bytes = int(1.05 * sum(self.adapters.bytes.values()))
        before = resident_bytes()
        self.engine = self.load_engine(model_dir, adapters_dir=self.adapters.folder, max_num_seqs=workload.large_crowd)
        self.note_memory("our engine with one base model, no adapter yet", resident_bytes() - before)

    def load_engine(self, model_dir: Path, *, adapters_dir: Path | None, max_num_seqs: int) -> OwnEngine:
        """An engine with room for everything that this run asks of it."""
        return OwnEngine(
            model_dir,
            adapters_dir=adapters_dir,
            max_num_seqs=max_num_seqs,
            adapter_pool_bytes=self.pool_bytes if adapters_dir else 1 << 20,
            kv_cache_bytes=KV_CACHE_BYTES,
        )

    def requests(self, adapters: Sequence[str], count: int, *, max_tokens: int | None = None) -> list[Request]:
        """The first `count` prompts; request i asks for adapter i, modulo their number."""
        return make_requests(self.prompts[:count], adapters, max_tokens or self.workload.output_tokens)

    def ours(self, name: str, requests: Sequence[Request]) -> Contender:
        """Our engine with these requests."""
        return Contender(name=name, run=lambda _: [self.engine.run(requests)])

    def measure(self, contenders: Sequence[Contender]) -> list[Row]:
        """All contenders in turn, through the gate."""
        present = [contender for contender in contenders if not contender.theirs or self._can_take_part(contender)]
        rounds = interleave(present, self.workload.rounds, check=self.gate.check)
        return [row for contender in present for row in rows_of(contender, rounds[contender.name], self.cost)]

    def keep_merged(self, names: Sequence[str]) -> list[PreTrainedModel]:
        """Merged models that stay in memory until `forget_merged`."""
        for name in names:
            if name not in self.kept:
                self.kept[name] = self.merger.keep(self.adapters.path(name))
        return [self.kept[name] for name in names]

    def forget_merged(self) -> None:
        """Their memory is needed."""
        self.kept.clear()
        gc.collect()

    def save_merged(self, name: str) -> Path:
        """The merged model as a directory that an engine can serve."""
        target = self.folder / "merged" / name
        if not target.exists():
            shutil.copytree(self.model_dir, target, ignore=shutil.ignore_patterns("*.safetensors"))
            self.keep_merged([name])[0].save_pretrained(target)
        return target

    def note_memory(self, what: str, num_bytes: int, how: str = "resident memory before and after") -> None:
        self.memory.append(Memory(what=what, bytes=num_bytes, how=how))

    def close(self) -> None:
        self.engine.close()

    def _can_take_part(self, contender: Contender) -> bool:
        try:
            for run in contender.run(0):
                self.gate.check(run)
        except (GateRedError, WorkerError) as problem:
            self.skipped.append(Skipped(contender=contender.name, why=str(problem)))
            return False
        return True

    def _reference(self, adapter: str) -> PreTrainedModel:
        if adapter == "":
            return self.base
        return self.kept[adapter] if adapter in self.kept else self.merger.borrow(self.adapters.path(adapter))
