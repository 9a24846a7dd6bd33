"""The host cache: bounded in bytes, and the stalest goes first."""

from __future__ import annotations

import torch

from gralora_runtime.adapters.checkpoint.header import AdapterSummary
from gralora_runtime.adapters.checkpoint.loader import AdapterLayout, LoadedAdapter
from gralora_runtime.adapters.checkpoint.spec import Dialect
from gralora_runtime.adapters.residency.host_cache import HostCache

SUMMARY = AdapterSummary(
    dialect=Dialect.LORA,
    rank=1,
    blocks=1,
    hybrid_rank=0,
    equivalent_rank=1,
    scale=1.0,
    num_modules=0,
    tensor_bytes=0,
    packed_numel=0,
    base_model="",
)


def adapter(digest: str, num_bytes: int) -> LoadedAdapter:
    layout = AdapterLayout(digest=digest, numel=num_bytes // 4, width=1, modules=(), summary=SUMMARY)
    return LoadedAdapter(layout, torch.zeros(num_bytes // 4))


def test_what_is_put_in_comes_out_once() -> None:
    cache, a = HostCache(100), adapter("a", 40)
    cache.put(a)

    assert a is cache.pop("a")
    assert cache.pop("a") is None
    assert cache.used_bytes == 0
    cache.check_integrity()


def test_the_stalest_make_room_and_no_more_than_needed() -> None:
    cache = HostCache(100)
    for digest in "abcd":
        cache.put(adapter(digest, 24))
    cache.put(adapter("a", 24))  # used again
    cache.put(adapter("e", 48))

    assert [digest in cache for digest in "bcdae"] == [False, False, True, True, True]
    assert cache.used_bytes == 96
    cache.check_integrity()


def test_one_that_is_larger_than_the_cache_throws_nobody_out() -> None:
    cache = HostCache(100)
    cache.put(adapter("a", 40))
    cache.put(adapter("b", 104))

    assert "a" in cache
    assert "b" not in cache


def test_the_same_digest_is_counted_once() -> None:
    cache = HostCache(100)
    cache.put(adapter("a", 40))
    cache.put(adapter("a", 40))

    assert len(cache) == 1
    assert cache.used_bytes == 40
    cache.check_integrity()


def test_a_cache_of_no_bytes_keeps_nothing() -> None:
    cache = HostCache(0)
    cache.put(adapter("a", 4))

    assert len(cache) == 0
