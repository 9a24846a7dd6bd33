"""A request's hold on an adapter. A leaf file without torch, so that policy may name it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, eq=False)
class AdapterLease:
    """While it is held the slot keeps this content. Compared by identity: two leases on one adapter are two leases."""

    name: str
    digest: str  # SHA-256 of the adapter's mathematics; "" for the base model
    slot: int  # -1 for the base model
    generation: int  # of the slot; a stale one means that the slot was given to another adapter
    width: int  # widest sum of r*k over the adapter's modules


BASE_LEASE = AdapterLease(name="", digest="", slot=-1, generation=0, width=0)
