"""One thing that may go wrong around a server, and what was seen when it did."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from benchmarks.faults.stage import Stage


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """`saw`: calls by how they ended, "answered" or an error's reason, of the clients that were there when it happened.

    `recovered_s`: from when the fault ended (a kill: when it happened) to the first right answer of a new call.
    `lost`: what had been acknowledged and is not there afterwards. `problems`: what must not be, such as a wrong
    answer, an error without a reason, a call that hung, or descriptors and rows that were not given back. Both have to
    be empty.
    """

    saw: Mapping[str, int]
    recovered_s: float
    lost: Sequence[str] = ()
    problems: Sequence[str] = ()
    figures: Mapping[str, float] = field(default_factory=dict)  # whatever else was measured, by name and unit

    @property
    def is_good(self) -> bool:
        return not self.lost and not self.problems


@dataclass(frozen=True, slots=True)
class Fault:
    """`happens` says in a few words what is done to the server, for a table."""

    name: str
    happens: str
    run: Callable[[Stage], Outcome]
