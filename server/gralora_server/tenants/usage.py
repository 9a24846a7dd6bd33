"""What tenants used, by adapter: counts that only grow, for bills. Knows no limits and no disk.

A tenant has a row for each of its first `MAX_ADAPTERS` adapters that were served, and one for all others together. Rows
are never given up, because a count that falls would be a refund. So their number is bounded by that of the tenants.

Belongs to the event loop's thread; `since_start` may be called from any.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from itertools import islice

OTHERS = "(others)"  # the row of adapters that have none; no adapter can be called that
MAX_ADAPTERS = 256
MAX_NAMED_TENANTS = 1000  # whose counts since the start are told apart


@dataclass(slots=True)
class Counts:
    """What a row or a tenant is at. Refused requests are no requests."""

    requests: int = 0  # that the engine took on
    prompt_tokens: int = 0  # of those that came to a first token
    cached_tokens: int = 0  # of these, found in the prefix cache
    output_tokens: int = 0
    refused: int = 0  # for a quota or a full queue
    upload_bytes: int = 0  # received, whatever became of them

    def add(self, more: Counts) -> None:
        self.requests += more.requests
        self.prompt_tokens += more.prompt_tokens
        self.cached_tokens += more.cached_tokens
        self.output_tokens += more.output_tokens
        self.refused += more.refused
        self.upload_bytes += more.upload_bytes


COUNTED = tuple(field.name for field in fields(Counts))


@dataclass(frozen=True, slots=True)
class UsageRow:
    """At one moment. Tenant "" is the operator; adapter "" is the base model, `OTHERS` all that have no row."""

    tenant: str
    adapter: str
    counts: Counts


class Usage:
    """All of it. Counts that were restored go on."""

    def __init__(self, *, max_adapters: int = MAX_ADAPTERS, max_named_tenants: int = MAX_NAMED_TENANTS) -> None:
        self._max_adapters = max_adapters
        self._max_named_tenants = max_named_tenants
        self._rows: defaultdict[str, dict[str, Counts]] = defaultdict(dict)  # by tenant and adapter
        self._changed: set[tuple[str, str]] = set()  # since they were last taken
        self._named: dict[str, Counts] = {}  # tenants since the start
        self._others = Counts()

    def restore(self, rows: Iterable[UsageRow]) -> None:
        """Of a server before this one. Before anything is counted."""
        for row in rows:
            self._rows[row.tenant][row.adapter] = replace(row.counts)

    def add(self, tenant: str, adapter: str, more: Counts) -> None:
        """For an adapter that was served or uploaded: it gets a row, if there is one left."""
        rows = self._rows[tenant]
        if adapter not in rows and len(rows) - (OTHERS in rows) >= self._max_adapters:
            adapter = OTHERS
        self._add(tenant, adapter, more)

    def refuse(self, tenant: str, adapter: str) -> None:
        """A request for whatever a client calls an adapter: nobody gets rows by asking for them."""
        self._add(tenant, adapter if adapter in self._rows[tenant] else OTHERS, Counts(refused=1))

    def rows(self, *, tenant: str | None, first: tuple[str, str], limit: int) -> list[UsageRow]:
        """At most so many, by tenant and adapter, from `first` on. `tenant` None: of all."""
        return [self._row(key) for key in islice(self._keys(tenant, first), limit)]

    def take_changed(self) -> list[UsageRow]:
        """Rows that changed since the last call."""
        changed, self._changed = self._changed, set()
        return [self._row(key) for key in changed]

    def put_back(self, rows: Iterable[UsageRow]) -> None:
        """They were taken, but could not be kept."""
        self._changed.update((row.tenant, row.adapter) for row in rows)

    def since_start(self) -> tuple[Mapping[str, Counts], Counts]:
        """By tenant, and of all others together. Who is told apart stays so: each count only grows."""
        return {tenant: replace(counts) for tenant, counts in self._named.copy().items()}, replace(self._others)

    def _add(self, tenant: str, adapter: str, more: Counts) -> None:
        self._rows[tenant].setdefault(adapter, Counts()).add(more)
        self._changed.add((tenant, adapter))
        if tenant not in self._named and len(self._named) < self._max_named_tenants:
            self._named[tenant] = Counts()
        self._named.get(tenant, self._others).add(more)

    def _keys(self, tenant: str | None, first: tuple[str, str]) -> Iterator[tuple[str, str]]:
        tenants = self._rows.keys() if tenant is None else self._rows.keys() & {tenant}
        for one in sorted(tenants):
            if one >= first[0]:
                yield from ((one, adapter) for adapter in sorted(self._rows[one]) if (one, adapter) >= first)

    def _row(self, key: tuple[str, str]) -> UsageRow:
        tenant, adapter = key
        return UsageRow(tenant, adapter, replace(self._rows[tenant][adapter]))
