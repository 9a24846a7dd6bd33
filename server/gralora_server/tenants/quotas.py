"""All tenants' limits and what each has left. Knows no requests and no transport.

Belongs to the event loop's thread; `share_of_pool` may be called from any.

A tenant takes memory from its first request until nothing of it runs and its rates have recovered.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

from gralora_runtime.adapters.catalogue.uploads import Share
from gralora_runtime.adapters.residency.share import PoolShare
from gralora_runtime.errors import ConfigError, DrainingError, QueueFullError, QuotaExceededError, TooLateError
from gralora_server.tenants.allowance import Allowance, rates_of
from gralora_server.tenants.ownership import Ownership
from gralora_server.tenants.settings import LimitSettings, TenancySettings, TenantSettings
from gralora_server.tenants.tab import Tab

UNLIMITED = TenantSettings()
REFUSALS = (QuotaExceededError, QueueFullError, TooLateError, DrainingError)  # who is told so has used nothing
MIN_RATE = 1e-6  # one in twelve days; the inverse of much less is no number
LOOKED_AT = 2  # tenants at each admission: more than can come with it, so that none is kept for ever


class Quotas:
    """Tenants that have no settings, and the operator, have no limits."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._settings: Mapping[str, TenantSettings] = {}
        self._ownership = Ownership(TenancySettings())
        self._allowances: OrderedDict[str, Allowance] = OrderedDict()  # those that were looked at last come last

    def prepare(self, settings: TenancySettings) -> Callable[[], None]:
        """What puts these settings in force, for the event loop's thread. Raises `ConfigError`."""
        for tenant, of_tenant in settings.tenants.items():
            for name, rate in rates_of(of_tenant.limits).items():
                if rate < MIN_RATE:
                    raise ConfigError(f"tenants.{tenant}.limits.{name} must be at least {MIN_RATE:g}, got {rate:g}")
        return partial(self._put_in_force, settings, Ownership(settings))

    @contextmanager
    def admit(self, tenant: str, prompt_tokens: int) -> Iterator[Tab]:
        """A generation of about so long a prompt, while it lasts. Raises `QuotaExceededError`."""
        now_s = self._clock()
        self._forget_some(now_s)
        allowance = self._allowance(tenant, now_s)
        allowance.enter(prompt_tokens, now_s)
        tab = Tab(allowance, self._clock, prompt_tokens)
        try:
            yield tab
        except REFUSALS:
            tab.refuse()
            raise
        finally:
            tab.close()

    def share_of_uploads(self, tenant: str) -> Share | None:
        """What uploads of the tenant's names may take in all; None: as much as there is."""
        limit = self._limits_of(tenant).upload_bytes
        if limit is None:
            return None

        def refusal(taken_bytes: int, wanted_bytes: int) -> QuotaExceededError:
            asked = f"{wanted_bytes} bytes of an upload beside the {taken_bytes} that are kept"
            return QuotaExceededError(tenant, "upload_bytes", limit, asked)

        return Share(max_bytes=limit, is_own=partial(self._ownership.owns, tenant), refusal=refusal)

    def share_of_pool(self, name: str) -> PoolShare | None:
        """What the adapters of this one's owner may take of the pool; None: as much as there is."""
        owner = self._ownership.owner(name)
        limit = self._limits_of(owner).adapter_bytes
        if limit is None:
            return None
        return PoolShare(owner=owner, max_bytes=limit, refusal=partial(_too_large, owner, limit))

    def _put_in_force(self, settings: TenancySettings, ownership: Ownership) -> None:
        self._settings, self._ownership = dict(settings.tenants), ownership
        now_s = self._clock()
        for tenant, allowance in self._allowances.items():
            allowance.change(self._limits_of(tenant), now_s)

    def _limits_of(self, tenant: str) -> LimitSettings:
        return self._settings.get(tenant, UNLIMITED).limits

    def _allowance(self, tenant: str, now_s: float) -> Allowance:
        if tenant not in self._allowances:
            self._allowances[tenant] = Allowance(tenant, self._limits_of(tenant), now_s)
        return self._allowances[tenant]

    def _forget_some(self, now_s: float) -> None:
        for _ in range(min(LOOKED_AT, len(self._allowances))):
            tenant, allowance = self._allowances.popitem(last=False)
            if not allowance.is_whole(now_s):
                self._allowances[tenant] = allowance


def _too_large(tenant: str, limit: int, name: str, num_bytes: int) -> QuotaExceededError:
    return QuotaExceededError(tenant, "adapter_bytes", limit, f"{num_bytes} bytes of adapter {name!r}")
