"""Whose an adapter is: by its name and the settings alone, so that asking tells nobody what there is."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import translate

from gralora_server.tenants.caller import Caller
from gralora_server.tenants.settings import Role, TenancySettings

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

    def may_use_base_model(self, caller: Caller) -> bool:
        return self._public_base_model or is_operator(caller)

    def may_see(self, caller: Caller, name: str) -> bool:
        """Who may see an adapter may use it."""
        return is_operator(caller) or self._owns(caller, name) or self.is_public(name)

    def may_manage(self, caller: Caller, name: str) -> bool:
        """Given that its role lets it manage anything."""
        return is_operator(caller) or self._owns(caller, name)

    def is_public(self, name: str) -> bool:
        return self._public.fullmatch(name) is not None

    def _owns(self, caller: Caller, name: str) -> bool:
        return self._own.get(caller.tenant, _NOTHING).fullmatch(name) is not None


def is_operator(caller: Caller) -> bool:
    """For whom nothing belongs to somebody else."""
    return caller.tenant == "" or caller.role is Role.ADMIN


def _any_of(globs: Iterable[str]) -> re.Pattern[str]:
    patterns = [translate(glob) for glob in globs]
    return re.compile("|".join(patterns)) if patterns else _NOTHING
