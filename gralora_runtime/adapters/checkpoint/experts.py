"""Adapters on a mixture's experts, as PEFT writes them (`target_parameters`). Knows neither file nor config.

PEFT wraps the module that has the parameters, once for each that is targeted, in the order in which the module has
them. So the last one's tensors bear the module's name, and those before it have one `base_layer` more, each.

A pair's A [r * experts, in] is one expert's r rows after the other's. Its B [out, r * experts] is not cut so: of each
of the r columns, all experts' lie side by side.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from typing import Any

Matrix = Any  # numpy's or torch's
WRAPPED = ".base_layer"


def wrapper_paths(parameters: Iterable[str]) -> dict[str, str]:
    """By the path of each parameter that is targeted, in the order of their modules: that of what PEFT wraps it in."""
    paths: dict[str, str] = {}
    for module, own in groupby(parameters, key=module_of):
        names = list(own)
        paths |= {name: module + WRAPPED * (len(names) - 1 - place) for place, name in enumerate(names)}
    return paths


def module_of(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def unwrapped(path: str) -> str:
    """Of a module, from that of one of its wrappers."""
    while path.endswith(WRAPPED):
        path = path.removesuffix(WRAPPED)
    return path


def each_a(stored: Matrix, experts: int) -> Matrix:
    """A as [experts, in, r]."""
    return stored.reshape(experts, -1, stored.shape[1]).swapaxes(1, 2)


def each_b(stored: Matrix, experts: int) -> Matrix:
    """B as [experts, r, out]."""
    return stored.reshape(len(stored), -1, experts).swapaxes(0, 2)
