"""How much of each thing is measured."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    requests: int = 16  # at a time, each with its own schema
    tokens: int = 96  # of each answer
    prompt: int = 48  # tokens of each
    rounds: int = 5  # of both kinds
    compiled: int = 40  # schemas of ours
    public: int = 500  # schemas of the public set


QUICK = Plan(tokens=16, rounds=1, compiled=8, public=20)
