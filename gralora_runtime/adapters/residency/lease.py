"""The right of one request to use one slot of the adapter pool. Nothing here knows how it was got."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class AdapterLease:
    """While it is held, `slot` holds the adapter with this digest and nothing else. Slot -1 is the base model."""

    name: str
    digest: str  # of the weights that really serve: the key for everything derived from them
    slot: int
    generation: int  # of the slot; a lease is stale when the pool has another one
    width: int  # columns of intermediate result: r * k + hybrid_r, the largest of its modules
    serial: int  # tells leases of one adapter apart, so that each is released exactly once
    version: int = 0  # of the name; 0: the base model, which has none
    num_bytes: int = 0  # of the pool
    invocation: tuple[int, ...] = ()  # see `AdapterSpec`


BASE_LEASE = AdapterLease(name="", digest="", slot=-1, generation=0, width=0, serial=0)
