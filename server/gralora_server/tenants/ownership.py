"""Whose an adapter is: by its name and the settings alone, so that asking tells nobody what there is."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import translate
from functools import lru_cache

from gralora_server.tenants.caller import Caller
from gralora_server.tenants.settings import Role, TenancySettings

REMEMBERED = 10_000  # names whose owners are
_NOTHING = re.compile(r"(?!)")


class Ownership:
    """Names are without a version: "acme/pirate" for "acme/pirate@3". A tenant that there is not owns nothing."""

    def __init__(self, settings: TenancySettings) -> None:
        self._public_base_model = settings.public_base_model
        self._public = _any_of(settings.public_adapters)
        self._own = {
            name: _any_of((f"{name}/*",) if tenant.adapters is None else tenant.adapters)
            for name, tenant in settings.tenants.items()
        }
        # Whose it is: the first tenant's, if several say so; "": nobody's. From any thread.
        self.owner = lru_cache(REMEMBERED)(self._find_owner)

    def may_use_base_model(self, caller: Caller) -> bool:
        return self._public_base_model or is_operator(caller)

    def may_see(self, caller: Caller, name: str) -> bool:
        """Who may see an adapter may use it."""
        return is_operator(caller) or self.owns(caller.tenant, name) or self.is_public(name)

    def may_manage(self, caller: Caller, name: str) -> bool:
        """Given that its role lets it manage anything."""
        return is_operator(caller) or self.owns(caller.tenant, name)

    def is_public(self, name: str) -> bool:
        return self._public.fullmatch(name) is not None

    def owns(self, tenant: str, name: str) -> bool:
        return self._own.get(tenant, _NOTHING).fullmatch(name) is not None

    def _find_owner(self, name: str) -> str:
        return next((tenant for tenant in self._own if self.owns(tenant, name)), "")


def is_operator(caller: Caller) -> bool:
    """For whom nothing belongs to somebody else."""
    return caller.tenant == "" or caller.role is Role.ADMIN


def _any_of(globs: Iterable[str]) -> re.Pattern[str]:
    patterns = [translate(glob) for glob in globs]
    return re.compile("|".join(patterns)) if patterns else _NOTHING
