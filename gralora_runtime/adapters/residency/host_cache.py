"""Adapters in host memory that are not in the pool: the least recently used goes first. Knows digests, not names."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from gralora_runtime.adapters.checkpoint.loader import LoadedAdapter


class HostCache:
    """At most `capacity_bytes` of packed weights. An adapter moves between here and the pool; it is never in both."""

    def __init__(self, capacity_bytes: int, dropped: Callable[[str], None] = lambda _: None) -> None:
        """`dropped` hears of each digest that had to go."""
        self.capacity_bytes = capacity_bytes
        self.used_bytes = 0
        self._dropped = dropped
        self._adapters: OrderedDict[str, LoadedAdapter] = OrderedDict()  # by digest, the stalest first

    def __contains__(self, digest: str) -> bool:
        return digest in self._adapters

    def __len__(self) -> int:
        return len(self._adapters)

    def accepts(self, num_bytes: int) -> bool:
        return num_bytes <= self.capacity_bytes

    def put(self, adapter: LoadedAdapter) -> None:
        """Keep the adapter, dropping staler ones; one larger than the whole cache is not kept."""
        self.pop(adapter.digest)
        if not self.accepts(adapter.num_bytes):
            return
        while self.used_bytes + adapter.num_bytes > self.capacity_bytes:
            digest, stalest = self._adapters.popitem(last=False)
            self.used_bytes -= stalest.num_bytes
            self._dropped(digest)
        self._adapters[adapter.digest] = adapter
        self.used_bytes += adapter.num_bytes

    def find(self, digest: str) -> LoadedAdapter | None:
        """It stays here."""
        return self._adapters.get(digest)

    def pop(self, digest: str) -> LoadedAdapter | None:
        adapter = self._adapters.pop(digest, None)
        if adapter is not None:
            self.used_bytes -= adapter.num_bytes
        return adapter

    def check_integrity(self) -> None:
        held_bytes = sum(adapter.num_bytes for adapter in self._adapters.values())
        assert self.used_bytes == held_bytes, f"counted {self.used_bytes} bytes, hold {held_bytes}"
        assert self.used_bytes <= self.capacity_bytes, f"{self.used_bytes} bytes of {self.capacity_bytes}"
