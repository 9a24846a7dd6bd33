"""A goal, what was found, and whether that is good enough."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, slots=True)
class Gate:
    """`is_speed`: it depends on the machine and on who else uses it, so a quick run does not judge it."""

    name: str
    found: float
    at_most: float
    is_speed: bool = False

    @property
    def passed(self) -> bool:
        return self.found <= self.at_most


@dataclass(frozen=True, slots=True)
class PartResult:
    """What one part found."""

    figures: Mapping[str, Any]
    gates: Sequence[Gate]


def show(gates: Sequence[Gate]) -> None:
    table = Table("gate", "found", "at most", "")
    for gate in gates:
        table.add_row(gate.name, f"{gate.found:.4g}", f"{gate.at_most:g}", "" if gate.passed else "FAILED")
    Console(width=120).print(table)
