"""Engines over tiny models with an adapter of every kind, asked for logits; and PEFT, which knows the right ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from support.activated import adapted
from support.device import DEVICE, ON_GPU
from support.peft_adapters import all_linear, gralora_config, in_authors_dialect, lora_config, save_adapter
from support.tiny_models import OTHER_BUILDS, save_tiny_model, tiny_model

from gralora_runtime.adapters.residency.lease import AdapterLease
from gralora_runtime.assemble import EngineParts, assemble
from gralora_runtime.config import EngineConfig, in_directory
from gralora_runtime.intake.invocation import first_adapted
from gralora_runtime.plan import AdapterUse, RowPlan, StepPlan

PROMPT = [5, 250, 17, 99, 3, 280, 41, 8, 120, 77, 301, 12, 64, 200, 9, 33, 150, 71, 222, 18, 90, 45, 263, 31, 7, 180]
MAX_DIFFERENCE = 1e-3  # of a logit, fp32
MIXTURES = ("qwen2-moe", "qwen3-moe", "mixtral", "phimoe", "gpt-oss")
FLATTENING = ("opt", "opt-350m", "qwen2-moe")  # some layers see no sequences, so that PEFT cannot activate an adapter
BIASED = ("gpt2", "llama-biased", "qwen2")  # their linear layers, or some of them
WITHOUT_PROGRAM = ("gpt2", *OTHER_BUILDS)  # computed by transformers' own forward pass

RANKS_AND_BLOCKS = [(r, k) for r in (1, 2, 3, 4, 8, 12, 16, 24, 32, 64) for k in (1, 2, 4, 8) if r % k == 0]


def replacing_configs(architecture: str) -> dict[str, PeftConfig]:
    """Kinds with weights of their own in the place of the base model's, or pairs on the embedding; and a plain one."""
    linear = all_linear(architecture)
    some = linear[:1]  # the embedding has one of two names, and norms many: PEFT compares ends
    embeddings, norms = ["embed_tokens", "wte"], ["norm", "layernorm", "ln_1", "ln_2", "ln_f"]
    return {
        "all-biases": lora_config(architecture, 4, bias="all", target_modules=some),  # those of norms, too
        "both-ends": gralora_config(architecture, 4, 2, target_modules=some, modules_to_save=["lm_head", *embeddings]),
        "embedding": lora_config(architecture, 37, use_rslora=True, target_modules=embeddings),
        "embedding-too": lora_config(architecture, 4, target_modules=[*linear, *embeddings]),
        "norms": lora_config(architecture, 4, target_modules=some, modules_to_save=norms),
        "plain": lora_config(architecture, 5),
        "saved-head": lora_config(architecture, 4, target_modules=some, modules_to_save=["lm_head"]),
        "tokens": lora_config(architecture, 4, target_modules=some, trainable_token_indices=[5, 99, 180, 31, 17]),
        "tokens-of-head": lora_config(
            architecture, 4, target_modules=some, trainable_token_indices={"lm_head": [5, 99, 300]}
        ),
    }


def adapter_configs(architecture: str, *, all_ranks: bool = True) -> dict[str, PeftConfig]:
    """Every kind, by adapter name. Names that end in "-authors" are rewritten in the authors' dialect."""
    configs: dict[str, PeftConfig] = {
        "gralora-r8-k2": gralora_config(architecture, 8, 2),
        "hybrid": gralora_config(architecture, 8, 4, hybrid_r=3),
        "hybrid-authors": gralora_config(architecture, 4, 2, hybrid_r=5, alpha=7),
        "gralora-authors": gralora_config(architecture, 12, 4, alpha=5),
        "lora": lora_config(architecture, 5),
        "rslora": lora_config(architecture, 9, use_rslora=True, alpha=3),
    }
    if architecture not in FLATTENING:
        # Both are found in every beginning of PROMPT that a test may ask for.
        configs["activated"] = lora_config(architecture, 6, alora_invocation_tokens=PROMPT[2:4])
        configs["activated-gralora"] = gralora_config(
            architecture, 8, 2, hybrid_r=2, alora_invocation_tokens=PROMPT[1:4]
        )
    linear = all_linear(architecture)
    if architecture in ("llama", "granite", "gemma2", "gpt2"):  # untied, scaled logits, soft-capped ones, tied
        modules = [*linear, "lm_head"]
        configs["head"] = lora_config(architecture, 4, target_modules=modules)
        configs["head-bias"] = lora_config(architecture, 2, target_modules=modules, lora_bias=True)
    if architecture == "llama":
        configs["gralora-head"] = gralora_config(architecture, 4, 2, target_modules=["lm_head"])
        configs["dora-head"] = lora_config(architecture, 4, use_dora=True, target_modules=["lm_head", "q_proj"])
    if architecture in MIXTURES:
        configs |= expert_configs(architecture)
    configs["dora"] = lora_config(architecture, 6, use_dora=True)
    if architecture in BIASED:
        configs["dora-biases"] = lora_config(architecture, 4, use_dora=True, bias="lora_only")
        configs["gralora-all-biases"] = gralora_config(architecture, 4, 2, bias="all", target_modules=linear[:1])
    if architecture == "llama":
        configs["lora-bias"] = lora_config(architecture, 3, lora_bias=True)
        if all_ranks:
            configs |= {f"r{r}-k{k}": gralora_config(architecture, r, k, alpha=r + 1) for r, k in RANKS_AND_BLOCKS}
        configs["patterns"] = lora_config(
            architecture, 4, rank_pattern={"q_proj": 11, r"layers\.1\.mlp.*": 2}, alpha_pattern={"down_proj": 31}
        )
        configs["attention-only"] = gralora_config(architecture, 8, 2, target_modules=["q_proj", "v_proj"])
        configs["last-layer"] = gralora_config(architecture, 4, 2, layers_to_transform=[1])
        configs["regex"] = gralora_config(architecture, 4, 2, target_modules=r".*layers\.0\..*(up|down)_proj")
    return configs


def expert_configs(architecture: str) -> dict[str, PeftConfig]:
    """PEFT's kinds of adapters on a mixture's experts."""
    gate_up, down = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
    attention = ["q_proj", "v_proj"]

    def on(*parameters: str, r: int, modules: list[str] = attention, **options: Any) -> PeftConfig:
        return lora_config(architecture, r, target_modules=modules, target_parameters=list(parameters), **options)

    return {
        "experts": on(gate_up, down, r=3),
        "experts-rslora": on("down_proj", r=5, use_rslora=True, alpha=3),
        "experts-alone": on("experts.gate_up_proj", r=4, modules=[]),
        "experts-patterns": on(
            down,
            gate_up,
            r=4,
            rank_pattern={"experts.gate_up_proj": 7, r"layers\.1.*down_proj": 2},
            alpha_pattern={"gate_up_proj": 9},
        ),
        "experts-of-a-layer": on("layers.1.mlp.experts.down_proj", r=6, modules=[]),
    }


@dataclass(frozen=True)
class Served:
    parts: EngineParts
    model_dir: Path
    adapters_dir: Path
    architecture: str
    tied: bool = False

    def logits(self, rows: list[tuple[AdapterLease, list[int]]], chunk: int) -> list[torch.Tensor]:
        """Last-token logits of each row, all rows in the same steps, prompts in chunks: only the last sample."""
        found: dict[str, torch.Tensor] = {}
        page_size = self.parts.info.page_size
        num_pages = -(-max(len(tokens) for _, tokens in rows) // page_size)
        for start in range(0, max(len(tokens) for _, tokens in rows), chunk):
            plans = []
            for index, (lease, tokens) in enumerate(rows):
                part = tuple(tokens[start : start + chunk])
                pages = tuple(range(index * num_pages, (index + 1) * num_pages))
                adapter = AdapterUse(lease.slot, lease.generation, lease.width)
                if part:
                    is_last = start + chunk >= len(tokens)
                    place = first_adapted(lease.invocation, tokens)
                    row = RowPlan(str(index), part, start, pages, adapter, samples=is_last, seat=index)
                    plans.append(row._replace(adapted_from=place))
            plans.sort(key=lambda row: len(row.token_ids) > 1)
            plan = StepPlan(tuple(plans), sum(len(row.token_ids) == 1 for row in plans))
            engine = self.parts.engine
            logits = self.parts.runner.execute(engine.batch.build(plan))
            sampling = [row.request_id for row in plans if row.samples]
            found |= dict(zip(sampling, logits.cpu(), strict=True))
        return [found[str(index)] for index in range(len(rows))]


CONFIG = EngineConfig(
    model=Path(),
    max_num_seqs=64,
    max_num_batched_tokens=2048,
    page_size=4,
    adapter_pool_bytes=64 << 20,
    max_adapter_rank=1024,
    kv_cache_bytes=16 << 20,
    num_threads=1,
    device=DEVICE,
)


@contextmanager
def serving(
    architecture: str,
    model_dir: Path,
    adapters_dir: Path,
    *,
    all_ranks: bool = True,
    configs: Mapping[str, PeftConfig] | None = None,
    tied: bool = False,
    **changes: object,
) -> Iterator[Served]:
    """An engine over a tiny model that has these adapters, of every kind if none are given. Both folders are written.

    On a GPU, too, its bits do not depend on the batch, if the model has a program of its own there.
    """
    changes.setdefault("batch_invariant", ON_GPU and architecture not in WITHOUT_PROGRAM)
    model = tiny_model(architecture, tied=tied)
    save_tiny_model(architecture, model_dir, tied=tied)
    for seed, (name, config) in enumerate((configs or adapter_configs(architecture, all_ranks=all_ranks)).items()):
        folder = save_adapter(model, config, adapters_dir / name, seed=seed)
        if name.endswith("-authors"):
            in_authors_dialect(folder)
    parts = assemble(replace(CONFIG, model=model_dir, adapters=in_directory(adapters_dir), **changes))
    yield Served(parts, model_dir, adapters_dir, architecture, tied)
    parts.adapters.check_integrity()
    parts.adapters.close()


def peft_logits(served: Served, name: str, tokens: list[int]) -> torch.Tensor:
    """Of the last token."""
    with (
        torch.inference_mode(),
        adapted(tiny_model(served.architecture, tied=served.tied), served.adapters_dir / name, tokens) as model,
    ):
        return model(torch.tensor([tokens])).logits[0, -1]


def check_against_peft(served: Served, chunk: int, length: int = len(PROMPT)) -> None:
    """All adapters and the base model in one batch, prompts of up to `length` tokens in chunks: logits as PEFT's."""
    names = [info.name for info in served.parts.adapters.list()]
    leases = [served.parts.adapters.acquire(name).result(30) for name in ["", *names]]
    try:
        # Different lengths, so that rows end, and decode beside prefill, in different steps.
        prompts = [PROMPT[: length - index % 5] for index in range(len(leases))]
        ours = served.logits(list(zip(leases, prompts, strict=True)), chunk)
    finally:
        for lease in leases:
            served.parts.adapters.release(lease)

    base = tiny_model(served.architecture, tied=served.tied)
    with torch.inference_mode():
        assert (ours[0] - base(torch.tensor([prompts[0]])).logits[0, -1]).abs().max() <= MAX_DIFFERENCE
    for name, prompt, logits in zip(names, prompts[1:], ours[1:], strict=True):
        expected = peft_logits(served, name, prompt)
        difference = (logits - expected).abs().max().item()
        assert difference <= MAX_DIFFERENCE, f"{name}: logits differ by {difference:.2g}"
        with torch.inference_mode():
            unadapted = base(torch.tensor([prompt])).logits[0, -1]
        assert (expected - unadapted).abs().max() > 0.05, f"{name} changes nothing: this test could not fail"
