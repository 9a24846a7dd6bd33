"""How a checkpoint spells the names of its tensors, where that is not how PEFT does. Knows neither file nor config.

PEFT writes `base_model.model.PATH.lora_A.weight`, where PATH is a module's in the causal LM. Others leave the beginning
out, leave the adapter's own name in (`lora_A.default.weight`), or trained the same layers inside of a multimodal model,
where their PATH is a longer one. One spelling counts for a whole file: so no two of its tensors are for one matrix.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

PREFIX = "base_model.model."

# How paths begin in a causal LM, and how where an adapter was trained: alike, which counts before all; or in a
# multimodal model with the same layers, of transformers since 4.52 or before, or of Idefics 3 and SmolVLM. No path
# begins in two of the latter ways, so one module fits, or none.
_BEGINNINGS = (
    ("", ""),
    ("model.", "model.language_model."),
    ("", "language_model."),
    ("model.", "model.text_model."),
)
_TENSOR = re.compile(
    r"(?P<path>.+?)\."
    r"(?:(?P<blocks>gralora_[AB])(?:\.(?P<blocks_of>[^.]+))?"
    r"|(?P<plain>gralora_[AB]_general|lora_[AB])(?:\.(?P<plain_of>[^.]+))?\.weight"
    r"|(?P<magnitudes>lora_magnitude_vector)(?:\.(?P<magnitudes_of>[^.]+))?"
    r"|(?P<b_biases>lora_B)(?:\.(?P<b_biases_of>[^.]+))?\.bias"
    r"|(?P<embedding>lora_embedding_[AB])(?:\.(?P<embedding_of>[^.]+))?"
    r"|(?P<base>(?:base_layer\.)?(?:bias|weight)|token_adapter\.(?:trainable_tokens_delta|base_layer\.weight)"
    r"|(?:original_module|modules_to_save)\.weight))"
)
# How PEFT's names end behind the adapter's own, by what `_TENSOR` calls them.
_ENDINGS = {"blocks": "", "plain": ".weight", "magnitudes": "", "b_biases": ".bias", "embedding": ""}
# Of a module that has a low-rank pair, and of others.
BIASES = ("base_layer.bias", "bias")
WEIGHTS = ("base_layer.weight", "weight")
ROWS = "token_adapter.trainable_tokens_delta"
UNDER_ROWS = "token_adapter.base_layer.weight"  # what they stand in the place of
UNDER_SAVED = "original_module.weight"  # the same of a module that was trained as a whole
SAVED_AGAIN = "modules_to_save.weight"
# The adapter's own name is never in these.
_OF_THE_BASE = (*BIASES, *WEIGHTS, ROWS, UNDER_ROWS, UNDER_SAVED, SAVED_AGAIN)


@dataclass(frozen=True, slots=True)
class TensorName:
    """The name of one matrix of a low-rank pair, or of what comes with one or in a weight's place, taken apart."""

    path: str  # of the module, with whatever stands before it
    matrix: str  # as PEFT calls it: gralora_A, lora_B.weight, ...
    adapter: str | None  # its own name; "" where there is none, as PEFT saves it; None where there never is one


@dataclass(frozen=True, slots=True, kw_only=True)
class Naming:
    """One spelling. As it is made without arguments, it is PEFT's."""

    prefix: str = PREFIX
    ours: str = ""  # how paths begin in the base model, and
    theirs: str = ""  # how they do in the model that the adapter was trained in
    adapter: str = ""

    def path(self, module: str) -> str:
        """Of a module of the base model: its path in the model that the adapter was trained in."""
        return self.theirs + module.removeprefix(self.ours) if module.startswith(self.ours) else module

    def tensor(self, path: str, matrix: str) -> str:
        """What the checkpoint calls a matrix, as PEFT calls it, of the module that has this path in training."""
        stem, dot, weight = matrix.partition(".")
        own = f".{self.adapter}" if self.adapter and matrix not in _OF_THE_BASE else ""
        return f"{self.prefix}{path}.{stem}{own}{dot}{weight}"

    def module(self, name: TensorName) -> str | None:
        """The base model's module that the tensor is for, if there is one; None: its name is of another spelling."""
        if name.adapter not in (self.adapter, None) or _prefix(name) != self.prefix:
            return None
        path = name.path.removeprefix(self.prefix)
        return self.ours + path.removeprefix(self.theirs) if path.startswith(self.theirs) else path

    def told(self) -> list[str]:
        """What is strange about it, in sentences for a person."""
        told = []
        if self.prefix != PREFIX:
            told.append(f"{PREFIX} does not stand before them")
        if self.adapter:
            told.append(f"the adapter's own name, {self.adapter!r}, stands in them")
        if self.ours != self.theirs:
            told.append(f"what is {self.theirs}* in the model that it was trained in is {self.ours}* in this one")
        return told


def take_apart(tensor: str) -> TensorName | None:
    """None: it is no part of a low-rank adapter."""
    match = _TENSOR.fullmatch(tensor)
    if match is None:
        return None
    for kind, ending in _ENDINGS.items():
        if stem := match[kind]:
            return TensorName(match["path"], stem + ending, match[f"{kind}_of"] or "")
    return TensorName(match["path"], match["base"], None)


def as_peft_names(tensor: str) -> str:
    """The same with PEFT's beginning and without the adapter's own name."""
    name = take_apart(tensor)
    return tensor if name is None else Naming().tensor(name.path.removeprefix(PREFIX), name.matrix)


def spelling(tensors: Collection[str]) -> Naming:
    """As far as names alone tell: the first one's."""
    for name in filter(None, map(take_apart, tensors)):
        if name.adapter is not None:
            return Naming(prefix=_prefix(name), adapter=name.adapter)
    return Naming()


def naming_for(tensors: Collection[str], modules: Collection[str]) -> Naming:
    """The spelling in which the first name that fits a base model with these modules does so.

    If none does, it is `spelling`: then a plan finds no tensors, and says so.
    """
    for name in filter(None, map(take_apart, tensors)):
        if name.adapter is None:
            continue
        prefix = _prefix(name)
        path = name.path.removeprefix(prefix)
        for ours, theirs in _BEGINNINGS:
            if path.startswith(theirs) and ours + path.removeprefix(theirs) in modules:
                return Naming(prefix=prefix, ours=ours, theirs=theirs, adapter=name.adapter)
    return spelling(tensors)


def _prefix(name: TensorName) -> str:
    return PREFIX if name.path.startswith(PREFIX) else ""
