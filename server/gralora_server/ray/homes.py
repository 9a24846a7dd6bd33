"""Which replica a request goes to: an adapter is at home with one of them, and of what is too much for it others get
the rest. Every proxy finds the same homes by itself, from names alone. Knows no Ray.
"""

from __future__ import annotations

from asyncio import Future
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import partial
from hashlib import blake2b
from typing import Any

# Of 20,000 simulated requests 96 to 99 in a hundred were served at home with two replicas, 90 to 95 with five; and of
# sixteen at once no replica gets more than twelve. With 1 to spare: eleven, but 92 to 99, and 77 to 90.
SHARE = 1.25  # of the mean
SPARE = 2


def order(adapter: str, loads: Mapping[str, int]) -> list[str]:
    """The replicas, in the order in which they are to be asked. `loads`: requests under way at each of them."""
    bound = most(sum(loads.values()) + 1, len(loads))
    # When one comes or goes, only what is at home there moves.
    by_score = sorted(loads, key=partial(_score, adapter), reverse=True)
    return sorted(by_score, key=lambda replica: loads[replica] + 1 > bound)


def most(requests: int, replicas: int) -> float:
    """Of so many requests under way, how many one replica is given while others have fewer."""
    return SHARE * requests / replicas + SPARE


def _score(adapter: str, replica: str) -> bytes:
    """The same in every process, which Python's own hash is not."""
    return blake2b(f"{replica} {adapter}".encode(), digest_size=8).digest()


class UnderWay:
    """Requests at each replica, as far as one proxy has sent them. Belongs to one event loop.

    What a replica tells of itself is late: of a burst of requests all would be sent before the first is counted.
    """

    def __init__(self) -> None:
        self._chosen: dict[Future[Any], str] = {}
        self._sent: Counter[str] = Counter()

    def choose(self, pending: Future[Any], replica: str) -> None:
        """`pending`: until the request is sent, or given up. It may be chosen for several times."""
        if pending not in self._chosen:
            pending.add_done_callback(self._chosen.pop)
        self._chosen[pending] = replica

    def send(self, replica: str) -> None:
        self._sent[replica] += 1

    def end(self, replica: str) -> None:
        """Also of what could not be sent."""
        self._sent[replica] -= 1
        if self._sent[replica] <= 0:
            del self._sent[replica]  # replicas come and go

    def loads(self, replicas: Iterable[str]) -> dict[str, int]:
        chosen = Counter(self._chosen.values())
        return {replica: self._sent[replica] + chosen[replica] for replica in replicas}
