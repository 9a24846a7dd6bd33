"""Who is calling: set for each call before its handler runs, and read wherever it matters."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass

from gralora_server.errors import UnauthenticatedError
from gralora_server.tenants.settings import Role


@dataclass(frozen=True, slots=True)
class Caller:
    """`tenant` "" is the operator, or anybody where there are no tenants."""

    tenant: str
    role: Role
    weight: float = 1.0


ANYBODY = Caller("", Role.ADMIN)

Recognise = Callable[[], Caller]  # who calls, by what the call showed and the newest settings; raises when nobody

_caller: ContextVar[Caller] = ContextVar("caller", default=ANYBODY)
_recognise: ContextVar[Recognise] = ContextVar("recognise", default=lambda: ANYBODY)


def current() -> Caller:
    """Of the call that this task serves."""
    return _caller.get()


def set_current(caller: Caller, recognise: Recognise | None = None) -> None:
    """For this task from now on. `recognise`: by which it is found out again; None: it will always be the same."""
    _caller.set(caller)
    _recognise.set(recognise or (lambda: caller))


def recognised() -> Caller:
    """Whoever began this call, as it would be known if it began now. Another tenant is somebody else."""
    caller = _recognise.get()()
    if caller.tenant != current().tenant:
        raise UnauthenticatedError
    _caller.set(caller)
    return caller
