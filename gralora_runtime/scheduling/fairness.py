"""What each tenant was served, by its weight: virtual token counters (VTC, arXiv 2401.00588). Knows no sequences.

Whoever was served least comes first. Who comes anew, or comes back, starts at what the least served of those that wait
has: nobody saves up for later by having been away.

Of two tenants that always want more, what they were served per unit of weight differs by no more than `bound`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

CROWD = 4  # times as many requests
# Of a step's token budget, for prompts of a crowd beside those who decode alone or nearly so: a longer step costs them
# time.
SHARE_BESIDE_OTHERS = 0.25
MAX_IDLE = 4096  # tenants without a request whose counts are kept; the one that left first is forgotten


@dataclass(frozen=True, slots=True, kw_only=True)
class Prices:
    """Of what is served, in the price of a prompt's token."""

    prompt_token: float = 1.0
    output_token: float = 2.0  # a step for few tokens takes longer for each of them
    adapter_byte: float = 1.6e-6  # that is loaded because a request asked for it


# Of SmolLM2 on two cores: a prompt's token takes 1.6 ms, 9.8 MB of an adapter 25.
CPU_PRICES = Prices()


@dataclass(slots=True, eq=False)
class Account:
    """One tenant's."""

    weight: float
    served: float = 0.0  # price of all that it was served, over its weight
    requests: int = 0  # that wait or run
    started: int = 0  # requests that got a place so far

    @property
    def crowd(self) -> float:
        """Requests by weight."""
        return self.requests / self.weight

    def crowds(self, others: Mapping[Account, float]) -> bool:
        """It has so many more requests than one of the others, by their weights, that they are held up by the machine
        and not by one another, and was served no less: then it is for it to wait where that makes a step shorter.

        `others`: and what counts as served of each.
        """
        return any(
            self is not other and self.served >= served and self.crowd >= CROWD * other.crowd
            for other, served in others.items()
        )


class Ledger:
    """All accounts. Only those with requests cost anything."""

    def __init__(self, prices: Prices) -> None:
        self.prices = prices
        self._accounts: dict[str, Account] = {}  # with requests
        self._idle: OrderedDict[str, Account] = OrderedDict()  # the first to leave first
        self.num_started = 0  # requests that got a place so far, of all tenants

    def enter(self, tenant: str, weight: float) -> Account:
        """One more request of this tenant."""
        account = self._accounts.get(tenant)
        if account is None:
            account = self._idle.pop(tenant) if tenant in self._idle else Account(weight)
            self._accounts[tenant] = account
        account.weight = weight  # the operator may have changed it: what was served stays as it was counted
        account.requests += 1
        return account

    def leave(self, tenant: str) -> None:
        """One request fewer."""
        account = self._accounts[tenant]
        account.requests -= 1
        if not account.requests:
            self._idle[tenant] = self._accounts.pop(tenant)
            if len(self._idle) > MAX_IDLE:
                self._idle.popitem(last=False)

    def start(self, tenant: str) -> None:
        """One of its requests got a place."""
        self._accounts[tenant].started += 1
        self.num_started += 1

    def account(self, tenant: str) -> Account:
        """Of a tenant with requests."""
        return self._accounts[tenant]

    def charge(self, tenant: str, price: float) -> None:
        """It was served so much more. A negative price takes back what did not come to pass."""
        account = self._accounts[tenant]
        account.served += price / account.weight

    def tenants(self) -> dict[str, Account]:
        """With requests. Other threads may ask."""
        return self._accounts.copy()


def bound(prices: Prices, *, longest_prompt: int, most_tokens: int) -> float:
    """How far apart two tenants of weight 1 that always want more can ever be: theorem 4.8 of the paper.

    `longest_prompt`: tokens. `most_tokens`: that the rows of one step can hold, of prompts and outputs together. It is
    the worst of all cases; rows that change hands keep the two far closer.
    """
    return 2.0 * max(prices.prompt_token * longest_prompt, prices.output_token * most_tokens)
