"""The right of one request to use one slot of the adapter pool. Nothing here knows how it was got."""

from __future__ import annotations

from dataclasses import dataclass

from gralora_runtime.adapters.catalogue.names import numbered, summed
from gralora_runtime.adapters.checkpoint.own_tokens import OwnToken
from gralora_runtime.request import ServedAdapter


@dataclass(frozen=True, slots=True)
class AdapterLease:
    """While it is held, `slot` holds the adapter with this digest and nothing else. Slot -1 is the base model."""

    name: str  # of a mix, what `summed` calls it
    digest: str  # of the weights that really serve: the key for everything derived from them
    slot: int
    generation: int  # of the slot; a lease is stale when the pool has another one
    width: int  # columns of intermediate result: r * k + hybrid_r, the largest of its modules
    serial: int  # tells leases of one adapter apart, so that each is released exactly once
    version: int = 0  # of the name; 0: the base model and mixes, which have none
    num_bytes: int = 0  # of the pool
    invocation: tuple[int, ...] = ()  # see `AdapterSpec`
    added_tokens: int = 0  # that it has behind those of the base model
    own_tokens: tuple[OwnToken, ...] = ()  # of its tokenizer, behind those of the base model's
    parts: tuple[ServedAdapter, ...] = ()  # of a mix

    @property
    def label(self) -> str:
        """Exactly which content serves, for logs; "" for the base model."""
        if self.parts:
            return summed((numbered(part.name, part.version), part.weight) for part in self.parts)
        return numbered(self.name, self.version) if self.version else self.name


BASE_LEASE = AdapterLease(name="", digest="", slot=-1, generation=0, width=0, serial=0)
