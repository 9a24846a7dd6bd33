"""How much of everything: an hour's numbers, and those of two minutes over a tiny model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A soak's size."""

    minutes: float = 60.0
    capacity_s: float = 90.0  # that are spent on measuring it
    load: float = 0.7  # of the capacity
    adapters: int = 400
    room: int = 120  # of them in the pool
    clients: int = 16  # while the capacity is measured
    operators: int = 2
    pause_s: float = 2.0  # of an operator between two changes
    sample_s: float = 5.0
    settings_s: float = 60.0  # between two readings of the configuration, by signal and by RPC in turn
    peft_samples: int = 20


TINY = Plan(
    minutes=2.0, capacity_s=15.0, adapters=120, room=40, pause_s=0.5, sample_s=1.0, settings_s=5.0, peft_samples=5
)
