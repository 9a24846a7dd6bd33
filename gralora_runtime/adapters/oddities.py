"""Finds what is odd about an adapter that is served all the same, as sentences for a person.

Knows the base model by its name and its weights' norms, and not who is told.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gralora_kernels.packing import Array
from gralora_runtime.adapters.checkpoint.bounds import closer_bound
from gralora_runtime.adapters.checkpoint.doubts import CHANGES_NOTHING, FAR_OUTSIDE, about_names, about_weights, beyond
from gralora_runtime.adapters.checkpoint.header import AdapterSummary
from gralora_runtime.adapters.checkpoint.loader import LoadedAdapter
from gralora_runtime.adapters.checkpoint.recipe import Layout
from gralora_runtime.adapters.checkpoint.remembered import remembered
from gralora_runtime.adapters.checkpoint.spec import ModuleShape
from gralora_runtime.adapters.checkpoint.whole import read_whole
from gralora_runtime.errors import AdapterRejectedError


@dataclass(frozen=True, slots=True, kw_only=True)
class Oddities:
    """What there is to say about adapters of one base model. Modules without a norm raise no doubts."""

    base_model: str
    base_norms: Mapping[str, float]
    modules: Sequence[ModuleShape]
    allowed_keys: Collection[str] = ()  # see `parse_config`

    def of_header(self, summary: AdapterSummary) -> tuple[str, ...]:
        """What can be said before weights are read."""
        return (*about_names(summary.base_model, self.base_model), *summary.notes)

    def of_content(self, adapter: LoadedAdapter, directory: Path, roots: Sequence[Path]) -> tuple[str, ...]:
        """All of it, of an adapter that was just read from this directory, which is read again for few of them only."""
        return (*self.of_header(adapter.layout.summary), *self._of_weights(adapter, directory, roots))

    def _of_weights(self, adapter: LoadedAdapter, directory: Path, roots: Sequence[Path]) -> list[str]:
        if not any(adapter.bounds):
            brings_more = adapter.layout.affines or adapter.layout.summary.replaces
            return [] if brings_more else [CHANGES_NOTHING]
        beyond_bound = np.flatnonzero(np.array(adapter.bounds) > _limits(adapter.layout.modules, self.base_norms))
        doubtful = dict(adapter.layout.modules[position] for position in beyond_bound)
        closer = {
            module.name: closer_bound(adapter.blob, module, doubtful[module.name])
            for module in (self.modules if doubtful else ())
            if module.name in doubtful
        }
        return self._exactly(adapter.digest, directory, roots) if beyond(closer, self.base_norms) else []

    def _exactly(self, digest: str, directory: Path, roots: Sequence[Path]) -> list[str]:
        """Nothing about files that have become others: whoever reads those will tell."""
        try:
            whole = read_whole(directory, self.modules, roots=roots, allowed_keys=self.allowed_keys)
        except AdapterRejectedError:
            return []
        return about_weights(whole.updates(), self.base_norms) if whole.digest == digest else []


@remembered
def _limits(modules: Layout, base_norms: Mapping[str, float]) -> Array:
    """What the norm of each module's update has to exceed to be told of: see `beyond`."""
    return np.array([FAR_OUTSIDE * base_norms.get(name, math.inf) for name, _ in modules])
