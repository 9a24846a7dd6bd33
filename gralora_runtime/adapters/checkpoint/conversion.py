"""The same adapter written down otherwise: in another dialect, as the plain LoRA that equals it, or a LoRA as blocks.

No weight is multiplied. A scale goes into alpha, which is chosen so that alpha / rank gives it back: always but for the
last bit of a float64, and kernels take float32. Tensors keep their bits and their dtype.

Blocks become one plain pair so: row c of block (j, n), which carries inputs n to outputs j, is row j*r + n*s + c of a
LoRA of rank k*r (s = r/k). Its A has A[n, :, j*s + c] at inputs n, its B has B[j, n*s + c, :] at outputs j, and zeros
are elsewhere. A hybrid's pair follows behind. Nothing is added up, so even that is a matter of places.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gralora_runtime.adapters.checkpoint.config_keys import INVOCATION
from gralora_runtime.adapters.checkpoint.naming import WEIGHTS, Naming, as_peft_names
from gralora_runtime.adapters.checkpoint.plan import ModulePlan, PartTensors
from gralora_runtime.adapters.checkpoint.spec import MAX_RANK, PARAMETERS, Dialect
from gralora_runtime.adapters.checkpoint.update import as_blocks
from gralora_runtime.adapters.checkpoint.whole import WholeAdapter
from gralora_runtime.errors import AdapterConversionError

# What means the same to all three readers. The authors' fork of PEFT ends with an error at a key that it does not know.
_KEPT = (
    "auto_mapping",
    "base_model_name_or_path",
    "fan_in_fan_out",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "revision",
    "target_modules",
    "task_type",
)


@dataclass(frozen=True, slots=True)
class Converted:
    """What a checkpoint consists of."""

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


def convert(adapter: WholeAdapter, to: Dialect) -> Converted:
    """The adapter in another dialect, or AdapterConversionError with every reason why there is no exact form."""
    if problems := _problems(adapter, to):
        raise AdapterConversionError(adapter.header.name, to, problems)
    if to is Dialect.LORA:
        return _as_lora(adapter)
    if adapter.header.dialect is Dialect.LORA:
        part = adapter.plan[0].parts[0].part  # all modules agree in rank and scale
        return Converted(_gralora_config(adapter, to, part.r, alpha_for(part.scale, part.r)), _as_one_block(adapter))
    alpha = adapter.config["gralora_alpha" if to is Dialect.PEFT_GRALORA else "alpha"]
    tensors = {as_peft_names(name): tensor for name, tensor in adapter.tensors.items()}
    return Converted(_gralora_config(adapter, to, adapter.header.rank, alpha), tensors)


def alpha_for(scale: float, rank: int) -> int | float:
    """What a config has to say so that alpha / rank is `scale`; an integer if there is one."""
    near = scale * rank
    for alpha in (round(near), near, math.nextafter(near, math.inf), math.nextafter(near, -math.inf)):
        if alpha / rank == scale:
            return alpha
    return near


def _problems(adapter: WholeAdapter, to: Dialect) -> list[str]:
    header = adapter.header
    if header.dialect is to:
        return [f"it is written as {to} already"]
    if (more := _more_than_pairs(adapter)) is not None:
        return [f"{more}, for which {to} has no exact form"]
    if to is Dialect.LORA and header.equivalent_rank > MAX_RANK:
        return [f"a LoRA that equals it has rank {header.equivalent_rank} (at most {MAX_RANK})"]
    if header.dialect is not Dialect.LORA:
        return []
    parts = [part.part for module in adapter.plan for part in module.parts]
    differing: dict[str, Counter[float]] = {
        "ranks": Counter(part.r for part in parts),
        "scales": Counter(part.scale for part in parts),
    }
    return [
        f"{to} has one of them for all modules, and this has {what} {_counted(counts)}"
        for what, counts in differing.items()
        if len(counts) > 1
    ]


def _more_than_pairs(adapter: WholeAdapter) -> str | None:
    """What it has beside pairs on linear layers, if it has any."""
    if replaced := [module.module.name for module in adapter.plan if module.replaces]:
        return f"it has its own weights in the place of {replaced[0]}'s"
    if adapter.vectors:
        return f"it has trained {' and '.join(adapter.vectors)}"
    if any(module.module.kind in PARAMETERS for module in adapter.plan):
        return "it is on parameters (target_parameters)"
    copies = sorted(adapter.header.tensors.keys() - adapter.tensors.keys())
    if others := [name for name in copies if not name.endswith(WEIGHTS[0])]:
        return f"it has {others[0]}, which may have rows of added tokens"
    return None


def _counted(counts: Counter[float]) -> str:
    shown = [f"{value:g} ({count} modules)" for value, count in counts.most_common(8)]
    return ", ".join(shown) + (f" and {len(counts) - 8} more" if len(counts) > 8 else "")


def _gralora_config(adapter: WholeAdapter, to: Dialect, rank: int, alpha: float) -> dict[str, Any]:
    spec = adapter.header.spec
    total = rank + spec.hybrid_rank
    authors = to is Dialect.AUTHORS_GRALORA
    return {
        **_common(adapter),
        "peft_type": "GRALORA",
        "gralora_alpha" if authors else "alpha": alpha,
        "gralora_dropout": adapter.config.get("gralora_dropout", adapter.config.get("lora_dropout", 0.0)),
        "gralora_k": spec.blocks,
        "hybrid_r": spec.hybrid_rank,
        "r": total if authors else rank,
    }


def _common(adapter: WholeAdapter) -> dict[str, Any]:
    kept = {key: adapter.config[key] for key in _KEPT if key in adapter.config}
    if adapter.config.get("exclude_modules"):  # which GraLoRA has not: a whole path in the list stands for itself alone
        kept |= {"target_modules": list(adapter.header.targets), "layers_pattern": None, "layers_to_transform": None}
    if adapter.header.spec.invocation:  # to our reader it means the same in all dialects
        kept[INVOCATION] = list(adapter.header.spec.invocation)
    return {**kept, "bias": "none", "modules_to_save": None}


def _as_one_block(adapter: WholeAdapter) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for module in adapter.plan:
        (pair,) = module.parts
        for name, to in ((pair.a_name, "gralora_A"), (pair.b_name, "gralora_B")):
            tensors[_name(module, to)] = as_blocks(adapter.tensors[name]).contiguous()
    return tensors


def _as_lora(adapter: WholeAdapter) -> Converted:
    rank = adapter.header.equivalent_rank
    tensors: dict[str, Tensor] = {}
    for module in adapter.plan:
        tensors[_name(module, "lora_A.weight")] = torch.cat([_plain_a(a) for a, _ in _pairs(module, adapter)])
        tensors[_name(module, "lora_B.weight")] = torch.cat([_plain_b(b) for _, b in _pairs(module, adapter)], dim=1)
    config = {
        **_common(adapter),
        "peft_type": "LORA",
        "lora_alpha": alpha_for(adapter.header.spec.scale, rank),
        "lora_dropout": adapter.config.get("gralora_dropout", 0.0),
        "r": rank,
    }
    return Converted(config, tensors)


def _pairs(module: ModulePlan, adapter: WholeAdapter) -> Sequence[tuple[Tensor, Tensor]]:
    def blocks(pair: PartTensors) -> tuple[Tensor, Tensor]:
        return as_blocks(adapter.tensors[pair.a_name]), as_blocks(adapter.tensors[pair.b_name])

    return [blocks(pair) for pair in module.parts]


def _plain_a(a: Tensor) -> Tensor:
    """A [k, in/k, r] as that of a plain pair, [k*r, in]."""
    k, width, r = a.shape
    plain = a.new_zeros(k, k, r // k, k, width)  # [j, n, c, inputs n, i]
    for n in range(k):
        plain[:, n, :, n] = a[n].reshape(width, k, r // k).permute(1, 2, 0)
    return plain.view(k * r, k * width)


def _plain_b(b: Tensor) -> Tensor:
    """B [k, r, out/k] as that of a plain pair, [out, k*r]."""
    k, r, width = b.shape
    plain = b.new_zeros(k, width, k, r)  # [outputs j, o, j, n*s + c]
    for j in range(k):
        plain[j, :, j] = b[j].T
    return plain.view(k * width, k * r)


def _name(module: ModulePlan, tensor: str) -> str:
    return Naming().tensor(module.module.name, tensor)
