"""Which linear layers read the same input, judged by their names, so that one product and one kernel serve them all."""

from __future__ import annotations

from collections.abc import Sequence

from gralora_runtime.adapters.checkpoint.spec import ModuleShape

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def group_siblings(modules: Sequence[ModuleShape]) -> list[tuple[ModuleShape, ...]]:
    """Every module once, in the order given; a module without siblings is a group of its own."""
    groups: dict[tuple[str, ...], list[ModuleShape]] = {}
    for module in modules:
        groups.setdefault(_family(module), []).append(module)
    return [tuple(sorted(group, key=_place)) for group in groups.values()]


def _family(module: ModuleShape) -> tuple[str, ...]:
    """Equal for modules of one group: the parent, what the group is called, and a size that siblings must share."""
    parent, _, leaf = module.name.rpartition(".")
    for family in FUSED:
        if leaf in family:
            return (parent, *family, str(module.in_features))
    return (module.name,)


def _place(module: ModuleShape) -> int:
    leaf = module.name.rpartition(".")[2]
    return next((family.index(leaf) for family in FUSED if leaf in family), 0)
