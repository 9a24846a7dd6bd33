"""The whole GPU program under the interpreter: PEFT's logits for every build and adapter kind, graphs or none."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from support.served import Served, check_against_peft, replacing_configs, serving

from gralora_runtime.model.programs.gpu import runner as runner_module
from gralora_runtime.model.programs.gpu.graphs import usual_ladder
from gralora_runtime.model.programs.gpu.runner import GpuRunner
from gralora_runtime.model.programs.transformers.runner import TransformersRunner
from gralora_runtime.plan import AdapterUse, RowPlan, StepPlan

# Windows are 24, and two of these come beyond. The others need no long prompt: one chunk, then a step of a few single
# tokens in a graph.
BUILDS = {
    "llama": 8, "llama-biased": 6, "qwen2": 8, "qwen3": 8, "mistral": 26, "gemma": 8, "gemma2": 26, "gemma3": 6,
    "phi3": 8, "granite": 6, "smollm3": 6, "olmo3": 6, "glm4": 6, "nemotron": 6, "phi": 6, "cohere2": 6,
}  # fmt: skip
SIZES = {"all_ranks": False, "kernel_backend": "triton", "max_num_seqs": 24, "max_num_batched_tokens": 512}


@pytest.mark.parametrize(("build", "length"), BUILDS.items())
def test_all_adapters_in_one_batch_have_pefts_logits(build, length, tmp_path):
    with serving(build, tmp_path / "model", tmp_path / "adapters", cuda_graphs=(4,), **SIZES) as served:
        assert isinstance(served.parts.runner, GpuRunner)
        check_against_peft(served, length - 1, length)


@pytest.mark.parametrize(("build", "length"), {"qwen3": 7, "gemma2": 6}.items())
def test_what_comes_in_the_place_of_the_base_model_s_has_pefts_logits(build, length, tmp_path):
    """Norms of heads, and those of Gemma; a scaled embedding. Graphs have none of it."""
    with serving(
        build, tmp_path / "model", tmp_path / "adapters", configs=replacing_configs(build), cuda_graphs=(4,), **SIZES
    ) as served:
        check_against_peft(served, length - 1, length)


@pytest.mark.parametrize("build", ["gpt2", "qwen3-moe", "gpt-oss"])
def test_a_build_without_a_program_has_pefts_logits_the_slow_way(build, tmp_path):
    with serving(build, tmp_path / "model", tmp_path / "adapters", **SIZES) as served:
        assert isinstance(served.parts.runner, TransformersRunner)
        check_against_peft(served, 5, 6)


def test_chunks_that_want_no_logits_are_computed_too(tmp_path):
    with serving("llama", tmp_path / "model", tmp_path / "adapters", cuda_graphs=(), **SIZES) as served:
        (lease,) = [served.parts.adapters.acquire("lora").result(30)]
        whole, in_chunks = (served.logits([(lease, [5, 6, 7, 8, 9])], chunk)[0] for chunk in (5, 2))

    torch.testing.assert_close(whole, in_chunks, rtol=1e-4, atol=1e-4)


def test_batch_invariant_logits_are_pefts_too(tmp_path):
    with serving(
        "qwen2", tmp_path / "model", tmp_path / "adapters", batch_invariant=True, cuda_graphs=(), **SIZES
    ) as served:
        check_against_peft(served, 5, 6)


@dataclass
class Sequence:
    """A row that decodes random tokens, in pages of its own."""

    name: str
    use: AdapterUse
    pages: tuple[int, ...]
    tokens: list[int] = field(default_factory=list)

    def plan(self) -> RowPlan:
        start = len(self.tokens) - 1
        return RowPlan(
            self.name, (self.tokens[-1],), start, self.pages, self.use, samples=True, seat=self.pages[0] // 4
        )


class Decoding:
    """Sequences that come and go, each step of which is computed by graphs and without, on two engines alike."""

    def __init__(self, with_graphs: Served, without: Served) -> None:
        self.engines = [served.parts for served in (with_graphs, without)]
        self.names = ["", "gralora-r8-k2", "lora", "hybrid"]
        self.uses = []
        for name in self.names:
            leases = [parts.adapters.acquire(name).result(30) for parts in self.engines]
            assert len({(lease.slot, lease.generation) for lease in leases}) == 1
            self.uses.append(AdapterUse(leases[0].slot, leases[0].generation, leases[0].width))
        self.random = np.random.default_rng(0)
        self.free = [tuple(range(4 * i, 4 * i + 4)) for i in range(5)]
        self.rows: list[Sequence] = []

    def come_and_go(self, count: int) -> None:
        """Some rows leave, others come, until there are `count`; each has a token to compute."""
        self.random.shuffle(self.rows)
        while len(self.rows) > count or (self.rows and self.random.random() < 0.3):
            self.free.append(self.rows.pop().pages)
        while len(self.rows) < count:
            use = self.uses[self.random.integers(len(self.uses))]
            self.rows.append(Sequence(str(len(self.rows)), use, self.free.pop(0)))
        for row in self.rows:
            row.tokens.append(int(self.random.integers(300)))

    def logits(self) -> tuple[torch.Tensor, torch.Tensor]:
        plan = StepPlan(tuple(row.plan() for row in self.rows), len(self.rows))
        one, other = (parts.runner.execute(parts.engine.batch.build(plan)) for parts in self.engines)
        return one, other


@pytest.fixture
def decoding(tmp_path):
    with (
        serving("llama", tmp_path / "a", tmp_path / "b", cuda_graphs=(1, 2, 4), **SIZES) as with_graphs,
        serving("llama", tmp_path / "c", tmp_path / "d", cuda_graphs=(), **SIZES) as without,
    ):
        yield Decoding(with_graphs, without)


def test_graphs_compute_what_launches_compute_while_rows_come_and_go(decoding, monkeypatch):
    """Padding reads and writes nobody's page, adapter or result; more rows than the largest graph are launched."""
    replayed, launched = [], []
    replay, launch = GpuRunner._replay, GpuRunner._launch
    monkeypatch.setattr(
        GpuRunner, "_replay", lambda self, step, rung, newest: replayed.append(rung) or replay(self, step, rung, newest)
    )
    monkeypatch.setattr(GpuRunner, "_launch", lambda self, *step: launched.append(self) or launch(self, *step))
    for count in (1, 3, 2, 5, 4, 3, 1, 2):
        decoding.come_and_go(count)
        one, other = decoding.logits()
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)

    assert set(replayed) == {1, 2, 4}
    assert decoding.engines[0].runner in launched, "no step was larger than the largest graph"
    for with_graphs, without in zip(*(parts.runner.model.layers for parts in decoding.engines), strict=True):
        torch.testing.assert_close(with_graphs.keys, without.keys, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(with_graphs.values, without.values, rtol=1e-4, atol=1e-4)


def test_a_step_that_does_not_fit_its_graph_is_launched_and_said_so_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(runner_module, "GRAPH_WIDTH", 1)  # no adapter is that narrow
    with serving("llama", tmp_path / "model", tmp_path / "adapters", cuda_graphs=(2,), **SIZES) as served:
        leases = [served.parts.adapters.acquire("lora").result(30) for _ in range(2)]
        caplog.clear()
        graphs = served.logits([(lease, [5, 6, 7]) for lease in leases], 1)
        served.parts.runner.ladder = None
        launched = served.logits([(lease, [5, 6, 7]) for lease in leases], 1)

    (refusal,) = [record.getMessage() for record in caplog.records if record.name == runner_module.__name__]
    assert refusal.startswith("a decode step is launched without a graph, which is slower: the step needs columns of u")
    assert all(map(torch.equal, graphs, launched))


def test_the_usual_ladder_pads_little():
    for most in (1, 3, 16, 128, 500):
        rungs = usual_ladder(most)
        assert rungs[-1] == most
        for rows in range(1, most + 1):
            rung = next(rung for rung in rungs if rung >= rows)
            assert rung < 2 * rows or rows == 1
            assert rung - rows <= 8 + rows / 8
