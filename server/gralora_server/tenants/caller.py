"""Who is calling: set for each call before its handler runs, and read wherever it matters."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass

from gralora_server.tenants.settings import Role


@dataclass(frozen=True, slots=True)
class Caller:
    """`tenant` "" is the operator, or anybody where there are no tenants."""

    tenant: str
    role: Role
    weight: float = 1.0


ANYBODY = Caller("", Role.ADMIN)

_caller: ContextVar[Caller] = ContextVar("caller", default=ANYBODY)


def current() -> Caller:
    """Of the call that this task serves."""
    return _caller.get()


def set_current(caller: Caller) -> None:
    """For this task from now on."""
    _caller.set(caller)
