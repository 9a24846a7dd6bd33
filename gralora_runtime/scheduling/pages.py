"""Who owns which KV page, and the prefix cache. Page numbers only: what is written in a page is the KV pool's business.

A page is in exactly one of three states: free, leased (by one or more sequences) or cached (by nobody, but holding a
known prefix that a later sequence may lease again). `free + leased + cached = total` always.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

PageKey = bytes


@dataclass(frozen=True, slots=True)
class PageCounts:
    """Pages by state; they add up to `total`."""

    total: int
    free: int
    leased: int
    cached: int


def page_key(parent: PageKey, token_ids: Sequence[int]) -> PageKey:
    """Name of a full page: everything its keys and values depend on.

    The chain starts at the adapter's content digest, so that two adapters, or two versions under one name, can never
    share a page. SHA-256, because a collision would answer a customer from another one's prompt.
    """
    return hashlib.sha256(parent + array("q", token_ids).tobytes()).digest()


def root_key(adapter_digest: str, scope: str = "") -> PageKey:
    """Start of an adapter's chain of page keys; "" is the base model's.

    Requests of another scope never meet its pages: how fast an answer comes would tell them what was asked before.
    """
    return hashlib.sha256(b"adapter:" + adapter_digest.encode() + b" scope:" + scope.encode()).digest()


def turning_key(parent: PageKey, adapter_digest: str, adapted_from: int) -> PageKey:
    """What takes the place of `parent` before the page in which a chain goes over from the base model to an adapter.

    The token is a part of it: of the same tokens some may be the base model's in one page and not in the other.
    """
    return hashlib.sha256(b"adapter:" + adapter_digest.encode() + b" from:%d after:" % adapted_from + parent).digest()


@dataclass(frozen=True, slots=True)
class PageChain:
    """Names of one sequence's full pages. Its tokens before `adapted_from` are the base model's, and so is a page that
    has no others. The first one that has some, and with it all after it, is of this adapter from that token on.
    """

    adapter_digest: str = ""
    scope: str = ""
    adapted_from: int = 0

    def key(self, before: PageKey | None, start: int, token_ids: Sequence[int]) -> PageKey:
        """Of the page that begins with token `start`; `before`: of the page before it, None where it is the first."""
        parent = before or root_key("" if self.adapted_from else self.adapter_digest, self.scope)
        if self.adapted_from and start <= self.adapted_from < start + len(token_ids):
            parent = turning_key(parent, self.adapter_digest, self.adapted_from)
        return page_key(parent, token_ids)


class PagePool:
    """Leases pages, shares those whose key is known, and reuses the oldest cached page when none is free."""

    def __init__(self, num_pages: int, page_size: int, *, enable_prefix_cache: bool = True) -> None:
        self.page_size = page_size
        self.enable_prefix_cache = enable_prefix_cache
        self._leases = [0] * num_pages
        self._keys: list[PageKey | None] = [None] * num_pages
        self._by_key: dict[PageKey, int] = {}
        self._free = list(range(num_pages - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # oldest first

    @property
    def num_pages(self) -> int:
        return len(self._leases)

    @property
    def num_available(self) -> int:
        """Pages that `allocate` can hand out now."""
        return len(self._free) + len(self._cached)

    def match(self, chain: PageChain, token_ids: Sequence[int]) -> tuple[list[int], list[PageKey]]:
        """Lease the pages of the longest cached prefix of `token_ids`; the caller must release them.

        The last token is never matched: its logits have to be computed.
        """
        pages: list[int] = []
        keys: list[PageKey] = []
        if not self.enable_prefix_cache:
            return pages, keys
        for start in range(0, len(token_ids) - self.page_size, self.page_size):
            key = chain.key(keys[-1] if keys else None, start, token_ids[start : start + self.page_size])
            page = self._by_key.get(key)
            if page is None:
                break
            pages.append(page)
            keys.append(key)
        for page in pages:
            self._lease(page)
        return pages, keys

    def allocate(self, count: int) -> list[int] | None:
        """Lease `count` fresh pages, or none at all and return None."""
        if count > self.num_available:
            return None
        return [self._allocate_one() for _ in range(count)]

    def publish(self, page: int, key: PageKey) -> None:
        """Make a full, computed page findable. A second page with the same content stays private."""
        if self.enable_prefix_cache and self._keys[page] is None and key not in self._by_key:
            self._keys[page] = key
            self._by_key[key] = page

    def release(self, pages: Iterable[int]) -> None:
        """Give up one lease on each page. Later pages of a prefix are released, hence evicted, first."""
        for page in reversed(list(pages)):
            assert self._leases[page] > 0, f"page {page} released twice"
            self._leases[page] -= 1
            if self._leases[page] == 0:
                if self._keys[page] is None:
                    self._free.append(page)
                else:
                    self._cached[page] = None

    def reclaim(self, held: Iterable[int]) -> None:
        """Make the leases exactly `held` again, after bookkeeping was interrupted: what nobody holds is idle."""
        self._leases = [0] * self.num_pages
        for page in held:
            self._leases[page] += 1
        self._by_key = {key: page for key, page in self._by_key.items() if self._keys[page] == key}
        self._keys = [None] * self.num_pages
        for key, page in self._by_key.items():
            self._keys[page] = key
        idle = [page for page, leases in enumerate(self._leases) if leases == 0]
        known = {page for page in idle if self._keys[page] is not None}
        self._cached = OrderedDict.fromkeys([*(page for page in self._cached if page in known), *sorted(known)])
        self._free = [page for page in reversed(idle) if self._keys[page] is None]

    def counts(self) -> PageCounts:
        """Pages by state."""
        leased = self.num_pages - len(self._free) - len(self._cached)
        return PageCounts(self.num_pages, len(self._free), leased, len(self._cached))

    def check_integrity(self, held: Iterable[int]) -> None:
        """Assert that the leases are exactly `held` (one entry for each sequence and page) and that states add up."""
        expected = [0] * self.num_pages
        for page in held:
            expected[page] += 1
        assert expected == self._leases, "page leases differ from what the sequences hold"
        idle = {page for page, leases in enumerate(self._leases) if leases == 0}
        assert idle == set(self._free) | set(self._cached), "an idle page is neither free nor cached"
        assert len(idle) == len(self._free) + len(self._cached), "a page is both free and cached"
        assert all(self._keys[page] is not None for page in self._cached), "a cached page has no key"
        assert all(self._keys[page] == key for key, page in self._by_key.items()), "a key names the wrong page"

    def _allocate_one(self) -> int:
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._cached.popitem(last=False)
            self._unpublish(page)
        self._leases[page] = 1
        return page

    def _lease(self, page: int) -> None:
        if self._leases[page] == 0:
            del self._cached[page]
        self._leases[page] += 1

    def _unpublish(self, page: int) -> None:
        key = self._keys[page]
        assert key is not None
        del self._by_key[key]
        self._keys[page] = None
