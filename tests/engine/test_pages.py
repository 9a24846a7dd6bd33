"""Pages: leased, shared by content, never lost, never shared across adapters."""

from __future__ import annotations

import itertools
import random

import pytest

from gralora_runtime.plan import NEVER
from gralora_runtime.scheduling.pages import PageChain, PagePool


def published(pool: PagePool, chain: PageChain, tokens: list[int]) -> list[int]:
    """Compute and publish all full pages of `tokens` as one sequence would; returns its leased pages."""
    pages = pool.allocate(len(tokens) // pool.page_size) or []
    key = None
    for index, page in enumerate(pages):
        start = index * pool.page_size
        key = chain.key(key, start, tokens[start : start + pool.page_size])
        pool.publish(page, key)
    return pages


def test_allocation_is_all_or_nothing() -> None:
    pool = PagePool(4, 2)

    assert pool.allocate(5) is None
    assert pool.counts().free == 4


def test_a_released_prefix_is_found_again_and_its_last_token_is_left_to_compute() -> None:
    pool = PagePool(8, 2)
    pages = published(pool, PageChain("a"), [1, 2, 3, 4])
    pool.release(pages)

    assert pool.match(PageChain("a"), [1, 2, 3, 4])[0] == pages[:1]
    assert pool.match(PageChain("a"), [1, 2, 3, 4, 5])[0] == pages


def test_another_adapter_never_matches_the_same_tokens() -> None:
    """vLLM keyed prefixes by name once: a reloaded adapter was answered from its predecessor's pages."""
    pool = PagePool(8, 2)
    pool.release(published(pool, PageChain("digest-of-a"), [1, 2, 3, 4]))

    assert pool.match(PageChain("digest-of-b"), [1, 2, 3, 4, 5])[0] == []
    assert pool.match(PageChain(""), [1, 2, 3, 4, 5])[0] == []


def test_pages_have_one_name_if_and_only_if_all_up_to_their_end_is_the_same() -> None:
    """Each token together with whose it is: the base model's, or an adapter's. Of two letters, so that many agree."""
    names, contents = set(), set()
    for digest, adapted_from in [("", 0), *((digest, at) for digest in ("a", "b") for at in (*range(8), NEVER))]:
        chain = PageChain(digest, adapted_from=adapted_from)
        for tokens in itertools.product((5, 6), repeat=6):
            whose = [digest if at >= adapted_from else "" for at in range(6)]
            key = None
            for start in range(0, 6, 2):
                key = chain.key(key, start, tokens[start : start + 2])
                content = tuple(zip(tokens, whose, strict=True))[: start + 2]
                names.add((key, content))
                contents.add(content)

    assert len({key for key, _ in names}) == len(names) == len(contents)


def test_tenants_do_not_meet_in_pages_before_an_invocation_either() -> None:
    pool = PagePool(8, 2)
    pool.release(published(pool, PageChain("a", "acme", adapted_from=3), [1, 2, 3, 4]))

    assert len(pool.match(PageChain("", "acme"), [1, 2, 3, 4, 5])[0]) == 1
    assert pool.match(PageChain("", "other"), [1, 2, 3, 4, 5])[0] == []


def test_the_same_page_after_another_prefix_is_another_page() -> None:
    pool = PagePool(8, 2)
    pool.release(published(pool, PageChain(""), [1, 2, 3, 4]))

    assert pool.match(PageChain(""), [9, 9, 3, 4, 5])[0] == []


def test_cached_pages_are_reused_oldest_first_and_deepest_first() -> None:
    pool = PagePool(4, 1)
    first = published(pool, PageChain(""), [1, 2])
    second = published(pool, PageChain(""), [7, 8])
    pool.release(first)
    pool.release(second)

    assert pool.allocate(1) == [first[1]]
    assert pool.match(PageChain(""), [1, 2, 3])[0] == [first[0]]


def test_a_page_in_use_is_never_reused() -> None:
    pool = PagePool(2, 1)
    pages = published(pool, PageChain(""), [1, 2])
    pool.match(PageChain(""), [1, 2, 3])
    pool.release(pages)

    assert pool.allocate(1) is None


def test_releasing_twice_is_our_bug() -> None:
    pool = PagePool(1, 1)
    pages = pool.allocate(1)
    assert pages is not None
    pool.release(pages)

    with pytest.raises(AssertionError, match="released twice"):
        pool.release(pages)


def test_integrity_check_sees_a_leak() -> None:
    pool = PagePool(2, 1)
    pool.allocate(1)

    with pytest.raises(AssertionError, match="differ"):
        pool.check_integrity([])


def test_switched_off_prefix_cache_matches_nothing() -> None:
    pool = PagePool(4, 1, enable_prefix_cache=False)
    pool.release(published(pool, PageChain(""), [1, 2]))

    assert pool.match(PageChain(""), [1, 2, 3]) == ([], [])
    assert pool.counts().free == 4


def test_a_thousand_random_sequences_leave_every_page_accounted_for() -> None:
    rng = random.Random(0)
    pool = PagePool(16, 2)
    held: list[list[int]] = []
    for _ in range(1000):
        if held and rng.random() < 0.5:
            pool.release(held.pop(rng.randrange(len(held))))
        else:
            chain, tokens = PageChain(rng.choice("ab")), [rng.randrange(2) for _ in range(rng.randrange(1, 9))]
            matched, _ = pool.match(chain, tokens)
            fresh = pool.allocate(-(-len(tokens) // 2) - len(matched))
            if fresh is None:
                pool.release(matched)
                continue
            key = None
            for index in range(len(tokens) // 2):
                key = chain.key(key, 2 * index, tokens[2 * index : 2 * index + 2])
                pool.publish((matched + fresh)[index], key)
            held.append(matched + fresh)
        pool.check_integrity(page for pages in held for page in pages)


def test_reclaiming_leaves_leases_to_who_holds_them_and_everything_else_idle() -> None:
    pool = PagePool(8, 2)
    kept = published(pool, PageChain("a"), [1, 2, 3, 4])
    cached = published(pool, PageChain("b"), [5, 6])
    pool.release(cached)
    pool.match(PageChain("a"), [1, 2, 3, 4, 5])  # leased, and then forgotten by an interrupted admission
    assert pool.allocate(3) is not None

    pool.reclaim(kept)

    pool.check_integrity(kept)
    counts = pool.counts()
    assert (counts.leased, counts.cached, counts.free) == (2, 1, 5)
    assert pool.match(PageChain("b"), [5, 6, 7])[0] == cached


@pytest.mark.parametrize("interrupted", ["publish", "unpublish", "release"])
def test_reclaiming_mends_what_was_interrupted_half_way(interrupted: str) -> None:
    pool = PagePool(4, 2)
    held = published(pool, PageChain("a"), [1, 2, 3, 4])
    if interrupted == "publish":
        pool._keys[pool._free[-1]] = b"nobody finds it by this"
    elif interrupted == "unpublish":
        del pool._by_key[pool._keys[held[1]]]
    else:
        pool.release(held[1:])
        pool._leases[held[0]] -= 1  # in neither list

    pool.reclaim([])

    pool.check_integrity([])
    assert pool.counts().free + pool.counts().cached == 4
