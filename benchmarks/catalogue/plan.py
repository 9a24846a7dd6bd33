"""How much of everything: a full run's numbers, and those of a quick one."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All parts' sizes."""

    adapters: int = 5000
    room: int = 300  # of them in the pool
    minutes: float = 10.0
    clients: int = 16
    operators: int = 4
    pause_s: float = 0.5  # of an operator between two changes
    sample_s: float = 5.0
    peft_samples: int = 20
    streams: int = 8
    stream_tokens: int = 400
    cold: int = 50
    cold_requests: int = 20
    rounds: int = 3
    starts: int = 3
    pages: int = 20
    acquires: int = 5000


QUICK = Plan(
    adapters=40, room=6, minutes=0.1, clients=4, operators=2, pause_s=0.0, sample_s=0.5, peft_samples=2, streams=2,
    stream_tokens=40, cold=3, cold_requests=2, rounds=1, starts=1, pages=3, acquires=50,
)  # fmt: skip
