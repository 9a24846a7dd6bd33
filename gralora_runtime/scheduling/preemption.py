"""Who gives way for whom when rows or pages run out. Looks at sequences, changes nothing.

A tenant that waits may take from one that was served more, as long as that one keeps no less of it, by their weights,
than the other then has. So a crowd of one tenant gives way at once, and two tenants of equal shares never take turns.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from gralora_runtime.scheduling.fairness import Ledger
from gralora_runtime.scheduling.sequence import Sequence


@dataclass(slots=True, eq=False)
class Holding:
    """What one tenant's running sequences hold."""

    weight: float
    sequences: list[Sequence] = field(default_factory=list)  # in order of admission
    pages: int = 0

    @property
    def last(self) -> Sequence:
        """Who gives way first: of the lowest priority the youngest."""
        return min(reversed(self.sequences), key=lambda sequence: sequence.priority)


def holdings(running: Iterable[Sequence]) -> dict[str, Holding]:
    """By tenant."""
    found: dict[str, Holding] = {}
    for sequence in running:
        holding = found.setdefault(sequence.tenant, Holding(sequence.weight))
        holding.sequences.append(sequence)
        holding.pages += len(sequence.pages)
    return found


def giver_of_row(newcomer: Sequence, running: Iterable[Sequence], ledger: Ledger) -> Sequence | None:
    """Who gives its row to a waiting sequence; None: it has to wait until one is free."""
    held = holdings(running)
    own = held.pop(newcomer.tenant, None)
    wanted = (1 + (len(own.sequences) if own is not None else 0)) / newcomer.weight
    served = ledger.account(newcomer.tenant).served
    givers = [
        holding
        for tenant, holding in held.items()
        if ledger.account(tenant).served >= served and (len(holding.sequences) - 1) / holding.weight >= wanted
    ]
    return max(givers, key=lambda giver: len(giver.sequences) / giver.weight).last if givers else None


def givers_of_pages(
    newcomer: Sequence, num_pages: int, missing: int, running: Iterable[Sequence], ledger: Ledger
) -> list[Sequence]:
    """Who give up all their pages so that a waiting sequence gets `num_pages`, of which `missing` are not free.

    Nobody, if that is not enough: then it has to wait.
    """
    held = holdings(running)
    own = held.pop(newcomer.tenant, None)
    wanted = (num_pages + (own.pages if own is not None else 0)) / newcomer.weight
    served = ledger.account(newcomer.tenant).served
    givers = [holding for tenant, holding in held.items() if ledger.account(tenant).served >= served]
    found: list[Sequence] = []
    while missing > 0:
        able = [
            giver
            for giver in givers
            if giver.sequences and (giver.pages - len(giver.last.pages)) / giver.weight >= wanted
        ]
        if not able:
            return []
        giver = max(able, key=lambda giver: giver.pages / giver.weight)
        sequence = giver.last
        giver.sequences.remove(sequence)
        giver.pages -= len(sequence.pages)
        missing -= len(sequence.pages)
        found.append(sequence)
    return found


def giver_among(running: Iterable[Sequence]) -> Sequence:
    """Who gives up its pages for somebody who already runs: the youngest of the tenant that holds most."""
    return max(holdings(running).values(), key=lambda holding: holding.pages / holding.weight).last
