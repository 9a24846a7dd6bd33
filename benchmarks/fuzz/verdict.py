"""What must hold of each call, and of the server at the end. Knows nothing of how calls are made."""

from __future__ import annotations

from dataclasses import dataclass

import grpc

from gralora_runtime.info import EngineLoad

# Of the memory that a server had after a quarter of the requests. After each tenth of 110,000 it was between 654 and
# 695 MiB, up and down, and at the end what it was after a quarter: what is allowed is that swing. Of 82,500 requests
# that are left then, each may leave 470 bytes behind before this fails.
GROWTH_SHARE, GROWTH_BYTES = 0.05, 4 << 20
LOST = "the call did not end by its deadline"
CRASHED = frozenset({grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.DATA_LOSS})
GONE = grpc.StatusCode.UNAVAILABLE


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """How a call ended. `reason` is the server's typed one; None as the code: it did not end in time."""

    code: grpc.StatusCode | None
    reason: str = ""
    message: str = ""

    @property
    def label(self) -> str:
        return LOST if self.code is None else self.reason or self.code.name


def problem_of(ending: Ending) -> str | None:
    """None: as it may end."""
    if ending.code is None or ending.code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return LOST
    if ending.code in CRASHED:
        return f"it ended with {ending.code.name}: {ending.message}"
    if ending.code is not grpc.StatusCode.OK and not ending.reason:
        return f"it was refused with {ending.code.name} and no reason: {ending.message}"
    if ending.code is GONE:
        return f"the server failed or was gone: {ending.label}: {ending.message}"
    return None


def growth_of(first_bytes: int, last_bytes: int) -> str | None:
    allowed = int(first_bytes * GROWTH_SHARE) + GROWTH_BYTES
    if last_bytes - first_bytes <= allowed:
        return None
    grown = (last_bytes - first_bytes) / 2**20
    return f"its memory grew by {grown:.1f} MiB from {first_bytes / 2**20:.0f} MiB"


def leftovers_of(load: EngineLoad) -> str | None:
    """Of a server that nobody calls."""
    left = {
        "running": load.running,
        "waiting": load.waiting,
        "waiting for an adapter": load.waiting_for_adapter,
        "paused": load.paused,
        "pages": load.pages_leased,
        "adapter leases": load.adapter_leases,
        "lost pages": load.pages_total - load.pages_free - load.pages_cached - load.pages_leased,
        "failures": load.request_failures + load.step_failures,
    }
    found = ", ".join(f"{count} {what}" for what, count in left.items() if count)
    return f"left behind: {found}" if found else None
