"""A change that all replicas make, and what became of it at one of them. Travels between processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gralora_server.tenants.caller import Caller


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """`request`: its message's bytes. `name`: the adapter that it is about, "" for none."""

    method: str
    request: bytes
    caller: Caller
    name: str
    origin: str  # the replica whose client asks for it
    is_kept: bool = True  # replicas that start later make it, too


@dataclass(frozen=True, slots=True)
class Entry:
    """Numbers grow, and have gaps."""

    number: int
    change: Change


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """`reason` "": it was done, and this is the response."""

    response: bytes = b""
    reason: str = ""
    message: str = ""


def with_change(kept: Mapping[int, Entry], entry: Entry) -> dict[int, Entry]:
    """Of changes that were made, those that matter now, in their order: an adapter that is unloaded has no past."""
    past = entry.change.name if entry.change.method == "UnloadAdapter" else None
    left = {
        number: one for number, one in kept.items() if number >= entry.number or past is None or one.change.name != past
    }
    return dict(sorted((left | {entry.number: entry}).items()))
