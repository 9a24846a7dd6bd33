"""What the memory fetches while threads multiply: a list of ranges per thread, taken up a tile at a time.

With many rows a base product leaves the memory idle, and the adapters that are wanted next are pure memory traffic. So
each step of a product's depth asks for one cache line of them. A range is a hint: nothing depends on it.
"""

# mypy: disable-error-code="no-any-return"

from __future__ import annotations

from numba import njit

from gralora_kernels.cpu.simd import load_int64, store_int64

# A list: number of ranges, the one that is being fetched, bytes fetched of it, and (address, bytes) of each range.
COUNT, CURRENT, FETCHED, RANGES = range(4)
MAX_RANGES = 256
LIST_BYTES = 8 * (RANGES + 2 * MAX_RANGES)


@njit(nogil=True)
def clear(ranges: int) -> None:
    """Forget all ranges."""
    store_int64(ranges, COUNT, 0)
    store_int64(ranges, CURRENT, 0)
    store_int64(ranges, FETCHED, 0)


@njit(nogil=True)
def append(ranges: int, address: int, size: int) -> None:
    """Fetch this range too, after those before it; forgotten when there are too many."""
    count = load_int64(ranges, COUNT)
    if count < MAX_RANGES and size > 0:
        store_int64(ranges, RANGES + 2 * count, address)
        store_int64(ranges, RANGES + 2 * count + 1, size)
        store_int64(ranges, COUNT, count + 1)


@njit(nogil=True)
def take(ranges: int, size: int, otherwise: int) -> int:
    """The next address to fetch about `size` bytes from; `otherwise` when all ranges have been fetched."""
    current = load_int64(ranges, CURRENT)
    if current >= load_int64(ranges, COUNT):
        return otherwise
    fetched = load_int64(ranges, FETCHED)
    address = load_int64(ranges, RANGES + 2 * current) + fetched
    fetched += size
    if fetched >= load_int64(ranges, RANGES + 2 * current + 1):
        current += 1
        fetched = 0
        store_int64(ranges, CURRENT, current)
    store_int64(ranges, FETCHED, fetched)
    return address
