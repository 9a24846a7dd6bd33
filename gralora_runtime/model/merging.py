"""An adapter merged into a model's weights: what a deployment without an adapter server serves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gralora_kernels.packing import Array
from gralora_runtime.adapters.checkpoint.affine import BaseNorm, ModuleVectors, affines_of, vectors_in
from gralora_runtime.adapters.checkpoint.config_keys import INVOCATION
from gralora_runtime.adapters.checkpoint.loader import LoadedAdapter
from gralora_runtime.adapters.checkpoint.own_tokens import TOKENIZER_FILE
from gralora_runtime.adapters.checkpoint.plan import Vector
from gralora_runtime.adapters.checkpoint.spec import ADDED, LayerKind, rejected
from gralora_runtime.adapters.checkpoint.unpacking import updates_in
from gralora_runtime.adapters.checkpoint.update import Update, dense
from gralora_runtime.adapters.checkpoint.whole import WholeAdapter, read_whole
from gralora_runtime.adapters.checkpoint.writer import new_directory
from gralora_runtime.model.adaptable import (
    changeable_modules,
    changeable_shapes,
    embedding_name,
    head_name,
    weight_and_bias,
)
from gralora_runtime.model.experts import parameter_weights
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
        merged = load_as_stored(model)
        adds_tokens = _add_tokens(merged, whole)
        brings_tokenizer = adds_tokens and (adapter / TOKENIZER_FILE).is_file()
        tokenizer = load_tokenizer(adapter if brings_tokenizer else model)
        problems = [*_nowhere_to_go(merged, whole), *_merge(merged, whole, report)]
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


@torch.no_grad()
def _add_tokens(model: PreTrainedModel, whole: WholeAdapter) -> bool:
    """Whether there are any. The model then has their rows as they were before pairs and rows of some tokens."""
    added = {module.module.kind: module.rows for module in whole.plan if module.rows and module.added_tokens}
    for kind, rows in added.items():
        model.resize_token_embeddings(rows.shape[0], mean_resizing=False)
        ends = {
            LayerKind.ADDED_EMBEDDING: model.get_input_embeddings,
            LayerKind.ADDED_HEAD: model.get_output_embeddings,
        }
        ends[kind]().weight[rows.first :] = whole.tensors[rows.name][rows.first :]
    return bool(added)


def _nowhere_to_go(model: PreTrainedModel, whole: WholeAdapter) -> Iterator[str]:
    ends = {head_name(model): "the embedding", embedding_name(model): "the output head"}
    rows = [module.rows for module in whole.plan if module.module.name in ends]
    is_tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    is_same = len(rows) == len(ends) and None not in rows and len(set(rows)) == 1
    for module in whole.plan:
        name = module.module.name
        if is_tied and not is_same and name in ends:
            yield f"merged into {name}, it would change {ends[name]}, which has the same weight"
        if not module.module.has_bias and any(vector.kind is Vector.B_BIASES for vector in module.vectors):
            yield f"merged into {module.module.name}, its {Vector.B_BIASES.value} have no bias to go to"


@torch.no_grad()
def _merge(model: PreTrainedModel, whole: WholeAdapter, report: Report) -> Iterator[str]:
    """In place. Yields what is wrong with the result."""
    layers = _weights_and_biases(model)
    updates = whole.updates()
    numbers = {name: tensor.float().numpy() for name, tensor in whole.tensors.items()}
    vectors = {one.plan.module.name: one for one in vectors_in(whole.plan, numbers)}
    for done, module in enumerate(whole.plan):
        if module.module.kind in ADDED:
            continue
        name = module.module.name
        report("Merging", done, len(whole.plan))
        weight, bias = layers[name]
        total = _sum(weight, updates.get(name, ()))
        if module.rows:
            own = total.t() if module.module.kind is LayerKind.EMBEDDING else total
            tokens = slice(None) if module.rows.tokens is None else list(module.rows.tokens)
            own[tokens] = whole.tensors[module.rows.name].float()
        if module.module.kind is LayerKind.NORM:
            total, shifts = _gains_and_shifts(whole.header.name, vectors[name], total, bias)
            if bias is not None:
                bias.copy_(shifts)
        elif name in vectors:
            gains, shifts = _gains_and_shifts(whole.header.name, vectors[name], total, bias)
            total = total * gains[:, None]
            if bias is not None and vectors[name].values.keys() != {Vector.MAGNITUDES}:  # those leave it alone
                bias.copy_(gains * bias.float() + shifts)
        weight.copy_(total)
        if not weight.isfinite().all():
            yield f"merged into {name}, it makes values that are not finite in {weight.dtype}"


def _gains_and_shifts(adapter: str, vectors: ModuleVectors, total: Tensor, bias: Tensor | None) -> Tensor:
    """fp32 [2, out]. `total`: the weight and what matrices add to it."""
    found = affines_of(adapter, [vectors], _Layer(total, bias))
    return torch.from_numpy(found[vectors.plan.module.name])


@dataclass(frozen=True, slots=True)
class _Layer:
    """The base layer that is being merged into: its pair is in `total` already."""

    total: Tensor
    own_bias: Tensor | None

    def bias(self, _module: str) -> Array | None:
        """fp32 [out]."""
        return None if self.own_bias is None else self.own_bias.detach().float().numpy()

    def factor(self, _module: str) -> float:
        """It is the model itself."""
        return 1.0

    def norms(self, _module: str, _a: Array, _b: Array) -> Array:
        """float64 [out]."""
        norms: Array = torch.linalg.vector_norm(self.total, dim=1, dtype=torch.float64).numpy()
        return norms

    def norm(self, module: str) -> BaseNorm:
        """It is the model itself."""
        return BaseNorm(self.total.numpy(), self.bias(module))

    def rows(self, _module: str, first: int, count: int) -> Array:
        """fp32 [count, in]."""
        rows: Array = self.total[first : first + count].numpy()
        return rows


@torch.no_grad()
def merge_adapter(model: PreTrainedModel, adapter: LoadedAdapter) -> None:
    """Add every update to its weight, in place. `adapter` has matrices alone, packed row-major (`ROW_MAJOR`).

    Raises AdapterRejectedError for one that is not applied to all tokens.
    """
    _check_mergeable(f"sha256:{adapter.digest[:12]}", adapter.layout.summary.invocation)
    layers = _weights_and_biases(model)
    for name, update in updates_in(adapter, changeable_shapes(model)).items():
        weight, _ = layers[name]
        weight.copy_(_sum(weight, update))


def _check_mergeable(name: str, invocation: Sequence[int]) -> None:
    if invocation:
        problem = "leaves the tokens before them to the base model, and merged weights would not"
        raise rejected(name, [f"{INVOCATION}: {list(invocation)} {problem}"])


def _weights_and_biases(model: PreTrainedModel) -> dict[str, tuple[Tensor, Tensor | None]]:
    """By module: a weight is [out, in], experts' are [experts, out, in]."""
    found = {shape.name: weight_and_bias(module) for shape, module in changeable_modules(model)}
    return found | {name: (weights, None) for name, weights in parameter_weights(model).items()}


def _sum(weight: Tensor, update: Update) -> Tensor:
    """fp32 [out, in] or [experts, out, in], to be rounded once."""
    total = weight.to(torch.float32, copy=True)
    for pair in update:
        total = total + dense(pair)
    return total
