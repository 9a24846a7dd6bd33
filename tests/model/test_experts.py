"""Adapters on a mixture's experts, as PEFT's `target_parameters` makes them: PEFT's answers, whoever else is there."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from adapters.test_loader import FilledMemory
from engine.test_async_engine import request, with_engine
from peft import PeftModel
from safetensors.torch import load_file, save_file
from support.peft_adapters import gralora_config, lora_config, save_adapter
from support.served import (
    CONFIG,
    MAX_DIFFERENCE,
    MIXTURES,
    PROMPT,
    Served,
    check_against_peft,
    expert_configs,
    peft_logits,
    serving,
)
from support.tiny_models import tiny_model
from support.workspaces import save_workspace

from gralora_kernels.cpu.backend import CpuBackend
from gralora_kernels.packing import ROW_MAJOR, Packing
from gralora_kernels.reference.adapters import ReferenceBackend
from gralora_runtime.adapters.checkpoint import loader
from gralora_runtime.adapters.checkpoint.bounds import closer_bound
from gralora_runtime.adapters.checkpoint.conversion import convert
from gralora_runtime.adapters.checkpoint.difference import difference
from gralora_runtime.adapters.checkpoint.header import inspect
from gralora_runtime.adapters.checkpoint.loader import load
from gralora_runtime.adapters.checkpoint.spec import Dialect, LayerKind, ModuleShape
from gralora_runtime.adapters.checkpoint.tensors import WEIGHTS_FILE
from gralora_runtime.adapters.checkpoint.unpacking import updates_in
from gralora_runtime.adapters.checkpoint.update import dense
from gralora_runtime.adapters.checkpoint.whole import read_whole
from gralora_runtime.adapters.residency.lease import AdapterLease
from gralora_runtime.assemble import assemble
from gralora_runtime.async_engine import AsyncEngine
from gralora_runtime.config import in_directory
from gralora_runtime.errors import AdapterConversionError, AdapterRejectedError
from gralora_runtime.model.adaptable import changeable_shapes
from gralora_runtime.model.experts import expert_shapes
from gralora_runtime.model.module_shapes import module_shapes
from gralora_runtime.model.programs.transformers.experts import ExpertAdapters
from gralora_runtime.request import Delta, GenerationRequest, Prompt, WeightedAdapter
from gralora_runtime.stream import merge_deltas

MIXTURE = "qwen3-moe"
GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
NUM_TOKENS = 12


@contextmanager
def leased(served: Served, *names: str) -> Iterator[list[AdapterLease]]:
    leases = [served.parts.adapters.acquire(name).result(30) for name in names]
    try:
        yield leases
    finally:
        for lease in leases:
            served.parts.adapters.release(lease)


def check_one(served: Served, name: str, prompt: list[int]) -> None:
    with leased(served, name) as leases:
        (ours,) = served.logits([(leases[0], prompt)], 9)

    assert (ours - peft_logits(served, name, prompt)).abs().max() <= MAX_DIFFERENCE, name


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("architecture", MIXTURES)
def test_alone_too_each_has_pefts_logits(architecture: str, backend: str, tmp_path: Path) -> None:
    with serving(architecture, tmp_path / "model", tmp_path / "adapters", kernel_backend=backend) as served:
        for name in expert_configs(architecture):
            check_one(served, name, PROMPT)


@pytest.mark.parametrize("architecture", MIXTURES)
def test_the_reference_gives_pefts_logits_in_one_batch(architecture: str, tmp_path: Path) -> None:
    with serving(architecture, tmp_path / "model", tmp_path / "adapters", kernel_backend="reference") as served:
        check_against_peft(served, 9)


def in_dtype(folder: Path, dtype: torch.dtype) -> Path:
    tensors = {key: tensor.to(dtype) for key, tensor in load_file(folder / WEIGHTS_FILE).items()}
    save_file(tensors, folder / WEIGHTS_FILE)
    return folder


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_storage_dtypes_give_pefts_logits(dtype: torch.dtype, tmp_path: Path) -> None:
    """Of 16 bits, two experts' matrices may share what one would take: ranks and widths are odd here."""
    with serving(MIXTURE, tmp_path / "model", tmp_path / "first") as first:
        for name in expert_configs(MIXTURE):
            in_dtype(first.adapters_dir / name, dtype)
    parts = assemble(replace(CONFIG, model=first.model_dir, adapters=in_directory(first.adapters_dir)))
    served = Served(parts, first.model_dir, first.adapters_dir, MIXTURE)
    for name in expert_configs(MIXTURE):
        check_one(served, name, PROMPT)
    parts.adapters.close()


def greedy(architecture: str, folder: Path | None, prompt: list[int]) -> list[int]:
    """By PEFT."""
    model = tiny_model(architecture)
    model = model if folder is None else PeftModel.from_pretrained(model, folder).eval()
    answer: list[int] = []
    with torch.inference_mode():
        for _ in range(NUM_TOKENS):
            answer.append(int(model(torch.tensor([prompt + answer])).logits[0, -1].argmax()))
    return answer


@pytest.mark.parametrize("architecture", ["qwen3-moe", "mixtral"])
def test_all_at_once_get_pefts_greedy_tokens(architecture: str, tmp_path: Path) -> None:
    configs = expert_configs(architecture) | {"lora": lora_config(architecture, 4)}
    root = save_workspace(tmp_path, configs, architecture)

    async def work(engine: AsyncEngine) -> list[Delta]:
        async def ask(name: str) -> Delta:
            asked: GenerationRequest = replace(
                request(f"of {name}", name, max_tokens=NUM_TOKENS), prompt=Prompt(token_ids=tuple(PROMPT))
            )
            return merge_deltas([delta async for delta in await engine.submit(asked)])

        return await asyncio.gather(*map(ask, ["", *configs]))

    answers = with_engine(replace(CONFIG, model=root / "model", adapters=in_directory(root / "adapters")), work)

    for name, answer in zip(["", *configs], answers, strict=True):
        folder = root / "adapters" / name if name else None
        assert list(answer.token_ids) == greedy(architecture, folder, PROMPT), name
    assert len({answer.token_ids for answer in answers}) > len(answers) // 2, "most answers are the same"


def test_the_base_models_rows_keep_their_bits_beside_adapters_on_experts(tmp_path: Path) -> None:
    """On the last layer's, so that everybody's tokens go to the same experts as without."""
    with (
        serving(MIXTURE, tmp_path / "model", tmp_path / "adapters") as served,
        leased(served, "", "experts-of-a-layer") as (base, adapted),
    ):
        beside = served.logits([(base, PROMPT), (adapted, PROMPT[::-1])], 9)
        alone = served.logits([(base, PROMPT), (base, PROMPT[::-1])], 9)

    assert torch.equal(beside[0], alone[0])
    assert (beside[1] - alone[1]).abs().max() > 0.05


def test_where_nobody_has_adapters_on_a_layers_experts_it_is_computed_as_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    routed: list[object] = []
    route = ExpertAdapters.route

    def counted(self: ExpertAdapters, stacked: object, *rest: object) -> None:
        routed.append(stacked)
        route(self, stacked, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(ExpertAdapters, "route", counted)
    with (
        serving(MIXTURE, tmp_path / "model", tmp_path / "adapters") as served,
        leased(served, "", "lora", "dora", "experts-of-a-layer") as (*others, on_one),
    ):
        served.logits([(lease, PROMPT) for lease in others], len(PROMPT))
        assert routed == []
        served.logits([(lease, PROMPT) for lease in (*others, on_one)], len(PROMPT))
        assert len(routed) == 1, "of two layers, one"


def test_a_slot_that_was_another_adapters_gives_nobody_elses_answer(tmp_path: Path) -> None:
    """A pool for the largest adapter and no more, in any order: so they take each other's slot and memory."""
    configs = {f"{name}-{copy}": config for copy in "ab" for name, config in expert_configs(MIXTURE).items()}
    configs |= {"lora": lora_config(MIXTURE, 4), "gralora": gralora_config(MIXTURE, 8, 2)}
    root = save_workspace(tmp_path, configs, MIXTURE)
    modules = module_shapes(root / "model")
    largest = max(inspect(root / "adapters" / name).cpu_pool_bytes(modules) for name in configs)
    config = replace(
        CONFIG,
        model=root / "model",
        adapters=in_directory(root / "adapters"),
        adapter_pool_bytes=largest,
        host_cache_bytes=largest,
        watch="off",
    )
    parts = assemble(config)
    served = Served(parts, root / "model", root / "adapters", MIXTURE)
    right = {name: peft_logits(served, name, PROMPT) for name in configs}
    for name in random.Random(0).choices(list(configs), k=40):
        with leased(served, "", name) as leases:
            base, ours = served.logits([(lease, PROMPT) for lease in leases], 9)
        parts.adapters.check_integrity()
        assert (ours - right[name]).abs().max() <= MAX_DIFFERENCE, name
        nearest = min(right, key=lambda other: float((ours - right[other]).abs().max()))
        assert nearest == name
        with torch.inference_mode():
            assert (base - tiny_model(MIXTURE)(torch.tensor([PROMPT])).logits[0, -1]).abs().max() <= MAX_DIFFERENCE
    assert parts.adapters.stats().evictions > 10
    parts.adapters.close()


def peft_delta(architecture: str, folder: Path) -> dict[str, torch.Tensor]:
    """What PEFT's merge adds to each experts' parameter, as [experts, out, in]."""
    base = tiny_model(architecture).state_dict()
    merged = PeftModel.from_pretrained(tiny_model(architecture), folder).merge_and_unload().state_dict()
    names = [shape.name for shape in changeable_shapes(tiny_model(architecture)) if shape.experts > 1]
    changed = {name: merged[name] - base[name] for name in names if not torch.equal(merged[name], base[name])}
    return {name: delta.transpose(1, 2) if architecture == "gpt-oss" else delta for name, delta in changed.items()}


@pytest.mark.parametrize(
    "packing", [ROW_MAJOR, ReferenceBackend.packing, CpuBackend.packing], ids=["gpu", "ref", "cpu"]
)
@pytest.mark.parametrize("architecture", ["qwen3-moe", "gpt-oss"])
def test_each_expert_gets_what_peft_adds_to_it(architecture: str, packing: Packing, tmp_path: Path) -> None:
    """And reading all of the file, for tools, finds the same as loading does."""
    shapes = changeable_shapes(tiny_model(architecture))
    for name, config in expert_configs(architecture).items():
        folder = save_adapter(tiny_model(architecture), config, tmp_path / name)
        expected = peft_delta(architecture, folder)
        adapter = load(name, folder, shapes, torch.float32, max_width=64, packing=packing)
        whole = read_whole(folder, shapes)

        assert whole.digest == adapter.digest
        for (module, entries), bound in zip(adapter.layout.modules, adapter.bounds, strict=True):
            if module in expected:
                (shape,) = [shape for shape in shapes if shape.name == module]
                assert bound >= closer_bound(adapter.blob, shape, entries) >= expected[module].norm()
        for updates in (updates_in(adapter, shapes, packing), whole.updates()):
            found = {name: dense(update[0]) for name, update in updates.items() if update[0].is_stack}
            assert found.keys() == expected.keys()
            for parameter, delta in expected.items():
                torch.testing.assert_close(found[parameter], delta, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("packing", [ROW_MAJOR, CpuBackend.packing], ids=["rows", "cpu"])
def test_between_experts_matrices_there_are_zeros(
    packing: Packing, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the memory held before."""
    shapes = changeable_shapes(tiny_model(MIXTURE))
    folder = in_dtype(save_adapter(tiny_model(MIXTURE), expert_configs(MIXTURE)["experts"], tmp_path), dtype)
    blobs = []
    for fill in (0x00, 0xAB):
        monkeypatch.setattr(loader, "np", FilledMemory(fill))
        blobs.append(load("a", folder, shapes, torch.float32, max_width=64, packing=packing).blob)

    assert torch.equal(*blobs)


def test_what_an_adapter_takes_is_known_before_it_is_loaded(tmp_path: Path) -> None:
    with serving(MIXTURE, tmp_path / "model", tmp_path / "adapters") as served:
        modules = module_shapes(served.model_dir)
        for name in expert_configs(MIXTURE):
            before = served.parts.adapters.pool.used_bytes
            with leased(served, name):
                taken = served.parts.adapters.pool.used_bytes - before

            assert taken == inspect(served.adapters_dir / name).cpu_pool_bytes(modules)


def test_two_adapters_on_experts_are_told_apart_expert_by_expert(tmp_path: Path) -> None:
    shapes = changeable_shapes(tiny_model(MIXTURE))
    config = expert_configs(MIXTURE)["experts-alone"]
    one, other = (
        read_whole(save_adapter(tiny_model(MIXTURE), config, tmp_path / str(seed), seed=seed), shapes)
        for seed in range(2)
    )
    deltas = [peft_delta(MIXTURE, tmp_path / str(seed)) for seed in range(2)]
    found = {module.module: module for module in difference(one, other).modules}

    assert found.keys() == deltas[0].keys()
    for name, module in found.items():
        exact = float((deltas[0][name] - deltas[1][name]).norm())
        assert module.difference == pytest.approx(exact, rel=1e-4)
        assert module.norm_a == pytest.approx(float(deltas[0][name].norm()), rel=1e-4)


EXPERTS = "model.layers.0.mlp.experts"
TENSOR = f"tensor base_model.model.{EXPERTS}"
REFUSED: dict[str, tuple[dict[str, object], str]] = {
    "a router": (
        {"target_parameters": [GATE_UP, "gate.weight"]},
        f"target_parameters: 'gate.weight' names no experts of the base model (those of {EXPERTS}.gate_up_proj and",
    ),
    "nothing": ({"target_parameters": ["mlp.experts.w1"]}, "target_parameters: 'mlp.experts.w1' names no experts of"),
    "one of two": (
        {"target_parameters": [DOWN]},
        f"{TENSOR}.base_layer.lora_A.weight is for a parameter of {EXPERTS} that target_parameters does not name",
    ),
    "another rank": (
        {"rank_pattern": {"down_proj": 4}},
        f"{TENSOR}.lora_A.weight has shape [12, 20], the base model needs [16, 20]",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_does_not_fit_the_experts_is_refused_in_clear_words(kind: str, tmp_path: Path) -> None:
    change, told = REFUSED[kind]
    config = lora_config(MIXTURE, 3, target_modules=[], target_parameters=[GATE_UP, DOWN])
    folder = save_adapter(tiny_model(MIXTURE), config, tmp_path)
    written = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(written | change))

    with pytest.raises(AdapterRejectedError) as refusal:
        load("a", folder, changeable_shapes(tiny_model(MIXTURE)), torch.float32, max_width=64)

    assert any(problem.startswith(told) for problem in refusal.value.problems), refusal.value.problems


def test_a_model_without_such_experts_says_so(tmp_path: Path) -> None:
    folder = save_adapter(tiny_model(MIXTURE), expert_configs(MIXTURE)["experts-alone"], tmp_path)

    told = inspect(folder).fits(changeable_shapes(tiny_model("llama")))

    assert told[0].startswith("it matches no module of the base model")
    assert told[1] == (
        "target_parameters: 'experts.gate_up_proj' names no experts of the base model (it has none that can be adapted)"
    )


def test_what_has_no_form_with_experts_is_refused(tmp_path: Path) -> None:
    """PEFT adds up none of them, GraLoRA has no parameters, and only the model tells whose tensors are whose."""
    with serving(MIXTURE, tmp_path / "model", tmp_path / "adapters") as served:
        folder = served.adapters_dir / "experts"
        with pytest.raises(AdapterRejectedError, match=r"on experts .*down_proj.*, and PEFT adds up none of those"):
            served.parts.adapters.acquire_mix((WeightedAdapter("experts", 0.5), WeightedAdapter("lora", 0.5))).result(
                30
            )
        with pytest.raises(AdapterConversionError, match=r"on experts \(target_parameters\), for which gralora has no"):
            convert(read_whole(folder, module_shapes(served.model_dir)), Dialect.PEFT_GRALORA)
        with pytest.raises(AdapterRejectedError, match="target_parameters: which of its tensors are for which experts"):
            read_whole(folder)


def test_parameters_of_one_expert_alone_are_left_to_peft() -> None:
    """Which takes such a parameter for a linear layer's weight."""
    model = tiny_model(MIXTURE)
    experts = model.get_submodule("model.layers.0.mlp.experts")
    experts.gate_up_proj = torch.nn.Parameter(experts.gate_up_proj[:1])

    assert [shape.name for shape in expert_shapes(model)] == [f"model.layers.1.{name}" for name in (GATE_UP, DOWN)]
    assert ModuleShape(f"model.layers.1.{GATE_UP}", 64, 40, kind=LayerKind.EXPERTS, experts=4) in expert_shapes(model)
