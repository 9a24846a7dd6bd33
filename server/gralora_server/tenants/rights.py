"""What the call that is being served may do. Raises when it may not, and looks nothing up for that.

Another tenant's adapter and one that does not exist are refused by the same lines, whatever is registered or cached.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from gralora_runtime.adapters.catalogue.changes import any_name
from gralora_runtime.adapters.catalogue.names import parse_reference
from gralora_runtime.errors import AdapterNotFoundError
from gralora_runtime.observation.verdict import OTHERS
from gralora_runtime.request import GenerationRequest
from gralora_server.errors import PermissionDeniedError
from gralora_server.tenants.caller import Caller, current, recognised
from gralora_server.tenants.ownership import Ownership, is_operator
from gralora_server.tenants.request_ids import plain, scoped
from gralora_server.tenants.roles import check_call
from gralora_server.tenants.settings import LimitSettings, Role
from gralora_server.tenants.tenancy import Tenancy


@dataclass(frozen=True, slots=True)
class View:
    """Which names one caller sees by one state of the settings. Two of them are equal if they have to be."""

    caller: Caller
    ownership: Ownership

    def sees(self, name: str) -> bool:
        return self.ownership.may_see(self.caller, name)


class Rights:
    """Of whoever is calling, by the newest settings."""

    def __init__(self, tenancy: Tenancy) -> None:
        self._tenancy = tenancy

    def check_use(self, adapter: str, adapters: Sequence[str] = ()) -> None:
        """`adapter`: a name or one version of it, "" for the base model. `adapters`: instead of it, those of a sum."""
        for at, part in enumerate(adapters):
            self._check_seen(f"adapters[{at}].name", part)
        if adapters:
            return
        if adapter:
            self._check_seen("adapter", adapter)
        elif not self._ownership.may_use_base_model(current()):
            raise PermissionDeniedError("use the base model by itself: name an adapter")

    def check_see(self, name: str) -> None:
        self._check_seen("name", name)

    def check_manage(self, name: str) -> None:
        """`name`: of an adapter, or of one version of it."""
        if is_operator(current()):
            return
        plain = self._check_seen("name", name)
        if not self._ownership.may_manage(current(), plain):
            raise PermissionDeniedError(f"change adapter {plain!r}")

    def check_create(self, name: str) -> None:
        """Under a name of its own it may; whether others have something there plays no part."""
        if not self._ownership.may_manage(current(), name):
            raise PermissionDeniedError(f"give an adapter the name {name!r}")

    def check_path(self) -> None:
        """Where files lie is the operator's business."""
        if current().role is not Role.ADMIN:
            raise PermissionDeniedError("load from a path: leave it empty")

    def sees(self) -> Callable[[str], bool]:
        """Which names there are for whoever is calling now, for use in any thread and for as long as one likes."""
        caller = current()
        return any_name if is_operator(caller) else lambda name: self._ownership.may_see(caller, name)

    def view(self, method: str) -> View:
        """What the caller sees by the settings and at the time of now, for a call that goes on after they change.

        Raises when it could not begin now: its token has expired or is nobody's any more, or its role is too small.
        """
        caller = recognised()
        check_call(caller.role, method)
        return View(caller=caller, ownership=self._ownership)

    def owned(self, request: GenerationRequest) -> GenerationRequest:
        """The caller's. Prefixes of a tenant are its own, but for adapters that are everybody's, and sums of such."""
        caller = current()
        if not caller.tenant:
            return request
        tenant = self._tenancy.current.settings.tenants.get(caller.tenant)
        limits = LimitSettings() if tenant is None else tenant.limits
        named = [parse_reference("adapter", reference).name for reference in request.named_adapters]
        is_shared = bool(named) and all(map(self._ownership.is_public, named))
        return replace(
            request,
            request_id=scoped(caller.tenant, request.request_id),
            tenant=caller.tenant,
            weight=caller.weight,
            max_queued_requests=limits.queued_requests,
            max_queued_tokens=limits.queued_tokens,
            prefix_scope="" if is_shared else caller.tenant,
            base_prefix_scope=caller.tenant,
        )

    def ids_of(self, request_id: str) -> tuple[str, ...]:
        """The requests that the caller may mean by an id: its own; an admin's may be any tenant's."""
        caller = current()
        others = ("", *self._tenancy.current.settings.tenants) if caller.role is Role.ADMIN else ()
        return tuple(scoped(tenant, request_id) for tenant in dict.fromkeys((caller.tenant, *others)))

    def shown(self) -> Callable[[str], str]:
        """What the caller is told where a tenant, or a request by its id, is named."""
        caller = current()
        if is_operator(caller):
            return str
        return lambda name: name if name in ("", caller.tenant) else plain(caller.tenant, name) or OTHERS

    @property
    def _ownership(self) -> Ownership:
        return self._tenancy.current.ownership

    def _check_seen(self, field: str, reference: str) -> str:
        """The name without a version."""
        caller = current()
        if is_operator(caller):
            return reference
        name = parse_reference(field, reference).name
        if not self._ownership.may_see(caller, name):
            raise AdapterNotFoundError(name)
        return name
