"""Use by adapter, for thousands of adapters in little memory: the busiest have counts of their own, all others one.

Prometheus takes a counter that falls for a restart, and a name that comes and goes for many series. So:

- an adapter is named as soon as there is room, and loses its name only to one that was clearly busier of late;
- its own counts hold what it did while it was named, those of the others what adapters did while they were not. Nothing
  is ever moved between the two, so each only grows, and every request is counted once;
- an adapter that gets its name back goes on from its old counts. If it was forgotten meanwhile it begins at zero, which
  Prometheus takes for the restart that it is.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

BASE = ""  # the base model's account
OTHER = "other"  # the account of all adapters that have no name; one that is really called so is among them

LEAD = 10  # requests beyond twice as many: what it takes to get another adapter's name
MEMORY = 10  # unnamed adapters that are remembered for each named one
AGING = 100  # requests for each named adapter after which old requests count half


@dataclass(slots=True, eq=False)
class Tally:
    """Counts that only grow."""

    requests: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0


@dataclass(slots=True, eq=False)
class Account:
    """Of one adapter. What it does is added to `tally`: its own, or that of all others."""

    name: str
    tally: Tally
    own: Tally = field(default_factory=Tally)
    score: int = 0  # requests, of which old ones count less


class AdapterAccounts:
    """One thread calls `use` and adds to tallies; any may `read`. At most `max_named` adapters are named."""

    def __init__(self, max_named: int) -> None:
        self.max_named = max_named
        self._others = Tally()
        self._named: dict[str, Account] = {}
        self._unnamed: OrderedDict[str, Account] = OrderedDict()  # the least recently used first
        self._floor = 0  # no named adapter has a lower score
        self._uses = 0
        base = Tally()
        self.base = Account(BASE, base, base)

    def use(self, name: str) -> Account:
        """A request for this adapter begins. The account may change its tally while the request runs."""
        account = self.base if name == BASE else self._named.get(name)
        if account is None:
            account = self._remembered(name)
            account.score += 1
            self._name_if_busy(account)
        else:
            account.score += 1
        account.tally.requests += 1
        self._age()
        return account

    def read(self) -> Mapping[str, Tally]:
        """Copies by name, `BASE` and `OTHER` among them. The dictionary is copied whole, so any thread may call."""
        accounts = [self.base, *self._named.copy().values()]
        return {OTHER: replace(self._others)} | {account.name: replace(account.own) for account in accounts}

    def _remembered(self, name: str) -> Account:
        account = self._unnamed.pop(name, None) or Account(name, self._others)
        self._unnamed[name] = account
        if len(self._unnamed) > MEMORY * self.max_named:
            self._unnamed.popitem(last=False)
        return account

    def _name_if_busy(self, account: Account) -> None:
        if account.name == OTHER or self.max_named == 0:
            return
        if len(self._named) == self.max_named:
            if account.score < 2 * self._floor + LEAD:
                return
            least = min(self._named.values(), key=lambda named: named.score)
            self._floor = least.score
            if account.score < 2 * self._floor + LEAD:
                return
            del self._named[least.name]
            least.tally = self._others
            self._unnamed[least.name] = least
        del self._unnamed[account.name]
        account.tally = account.own
        self._named[account.name] = account

    def _age(self) -> None:
        self._uses += 1
        if self._uses >= AGING * max(1, self.max_named):
            self._uses = 0
            self._floor //= 2
            for account in (*self._named.values(), *self._unnamed.values()):
                account.score //= 2
