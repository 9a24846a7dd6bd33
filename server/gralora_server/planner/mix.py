"""The adapters that are planned for, by their headers: no weight is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle, islice
from pathlib import Path

from gralora_runtime.adapters.checkpoint.header import inspect
from gralora_runtime.errors import ConfigError
from gralora_runtime.model.module_shapes import kv_token_numel, module_shapes

ELEMENT_BYTES = 4  # of keys and values: planned for the CPU, where they are fp32


def adapter_bytes(model: Path, adapters: Path, names: Sequence[str]) -> dict[str, int]:
    """What each takes in the pool. Raises AdapterRejectedError for one that does not fit the model."""
    modules = module_shapes(model)
    headers = {name: inspect(adapters / name, name=name) for name in names}
    for header in headers.values():
        header.fitting_plan(modules)
    return {name: header.cpu_pool_bytes(modules) for name, header in headers.items()}


def applied_to_any_prompt(adapters: Path, names: Sequence[str]) -> list[str]:
    """Without those that begin at an invocation: what is measured are prompts that are drawn, which have none.

    Raises ConfigError if nobody is left.
    """
    found = [name for name in names if not inspect(adapters / name, name=name).spec.invocation]
    if not found:
        raise ConfigError(
            f"all adapters of {adapters} have alora_invocation_tokens, which prompts that are drawn have not"
        )
    return found


def kv_token_bytes(model: Path) -> int:
    """Keys and values of one token in all layers."""
    return ELEMENT_BYTES * kv_token_numel(model)


def customers(sizes: Mapping[str, int], count: int) -> dict[str, int]:
    """`count` adapters: those of the mix in turn, as often as it takes."""
    return {f"customer-{i:06}": size for i, size in enumerate(islice(cycle(sizes.values()), count))}
