"""Who a connection's certificate says its client is, by the names that gRPC has for such names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Names = Mapping[str, list[bytes]]

NOBODY: Names = {}
KINDS = {"commonName": "x509_common_name", "DNS": "peer_dns", "URI": "peer_uri"}  # Python's, and gRPC's


def names_of(certificate: Mapping[str, Any] | None) -> Names:
    """`certificate`: what Python tells of one that a handshake has checked; None or empty where there is none."""
    if not certificate:
        return NOBODY
    found: dict[str, list[bytes]] = {}
    parts = [part for group in certificate.get("subject", ()) for part in group]
    for kind, name in [*parts, *certificate.get("subjectAltName", ())]:
        if kind in KINDS:
            found.setdefault(KINDS[kind], []).append(name.encode(errors="replace"))
    return found
