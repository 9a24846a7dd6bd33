"""Whose trace a call belongs to: what its client said in `traceparent`, in gRPC's metadata or an HTTP header."""

from __future__ import annotations

from contextvars import ContextVar

HEADER = "traceparent"

_parent: ContextVar[str] = ContextVar("parent", default="")


def set_parent(traceparent: str) -> None:
    """For this task, and its own tasks, from now on. "": its client has no trace."""
    _parent.set(traceparent)


def parent() -> str:
    """Of the call that is served, as it was sent: whoever reads it passes over what is no such thing."""
    return _parent.get()
