"""An adapter merged into a model's weights: what a deployment without an adapter server serves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gralora_runtime.adapters.checkpoint.config_keys import INVOCATION
from gralora_runtime.adapters.checkpoint.loader import LoadedAdapter
from gralora_runtime.adapters.checkpoint.spec import rejected
from gralora_runtime.adapters.checkpoint.unpacking import updates_in
from gralora_runtime.adapters.checkpoint.update import Update, dense
from gralora_runtime.adapters.checkpoint.whole import read_whole
from gralora_runtime.adapters.checkpoint.writer import new_directory
from gralora_runtime.model.adaptable import adaptable_modules, weight_and_bias
from gralora_runtime.model.loading import load_as_stored, load_tokenizer
from gralora_runtime.model.module_shapes import module_shapes

Report = Callable[[str, int, int | None], None]  # stage, done, total


@dataclass(frozen=True, slots=True, kw_only=True)
class Merged:
    """A merged model, as it was written."""

    path: Path
    adapter_digest: str
    num_modules: int
    dtype: str


def write_merged(adapter: Path, model: Path, out: Path, report: Report) -> Merged:
    """Merge an adapter into a model, in the model's own dtype, and write it to `out`, whole or not at all.

    Raises AdapterRejectedError, ModelUnsupportedError, or ConfigError if a directory cannot be read or written.
    """
    whole = read_whole(adapter, module_shapes(model))
    _check_mergeable(whole.header.name, whole.header.spec.invocation)
    with new_directory(out) as fresh:
        report("Reading the model", 0, None)
        merged, tokenizer = load_as_stored(model), load_tokenizer(model)
        problems = []
        for done, (module, update, weight) in enumerate(_updated(merged, whole.updates())):
            report("Merging", done, len(whole.plan))
            add(weight, update)
            if not weight.isfinite().all():
                problems.append(f"merged into {module}, it makes values that are not finite in {weight.dtype}")
        if problems:
            raise rejected(whole.header.name, problems)
        report("Writing safetensors", 0, None)
        merged.save_pretrained(fresh)
        tokenizer.save_pretrained(fresh)
    return Merged(
        path=out,
        adapter_digest=whole.digest,
        num_modules=len(whole.plan),
        dtype=str(merged.dtype).removeprefix("torch."),
    )


def merge_adapter(model: PreTrainedModel, adapter: LoadedAdapter) -> None:
    """Add every update to its weight, in place. `adapter` is packed row-major, in one dtype (`ROW_MAJOR`).

    Raises AdapterRejectedError for one that is not applied to all tokens.
    """
    _check_mergeable(f"sha256:{adapter.digest[:12]}", adapter.layout.summary.invocation)
    updates = updates_in(adapter, [shape for shape, _ in adaptable_modules(model)])
    for _, update, weight in _updated(model, updates):
        add(weight, update)


@torch.no_grad()
def add(weight: Tensor, update: Update) -> None:
    """weight [out, in] += update, summed in float32 and rounded once to the weight's dtype."""
    total = dense(update[0])
    for pair in update[1:]:
        total += dense(pair)
    weight += total


def _check_mergeable(name: str, invocation: Sequence[int]) -> None:
    if invocation:
        problem = "leaves the tokens before them to the base model, and merged weights would not"
        raise rejected(name, [f"{INVOCATION}: {list(invocation)} {problem}"])


def _updated(model: PreTrainedModel, updates: dict[str, Update]) -> Iterable[tuple[str, Update, Tensor]]:
    """Each update with the weight that it is for."""
    modules = {shape.name: module for shape, module in adaptable_modules(model)}
    return ((name, update, weight_and_bias(modules[name])[0]) for name, update in updates.items())
