"""Whose a client's certificate is, by the names in it. That its authority is ours was checked by the handshake."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from gralora_runtime.errors import ConfigError
from gralora_server.tenants.caller import Caller
from gralora_server.tenants.roles import rank

# What gRPC calls the common name, and the DNS names and URIs of the subjectAltName.
_NAMES = ("x509_common_name", "peer_dns", "peer_uri")


class Certificates:
    """Who is who, by name."""

    def __init__(self, subjects: Iterable[tuple[str, Caller]]) -> None:
        self._callers: dict[str, Caller] = {}
        for subject, caller in subjects:
            other = self._callers.setdefault(subject, caller)
            if other is not caller:
                raise ConfigError(
                    f"the certificate subject {subject!r} is given twice: to {other.tenant!r} and {caller.tenant!r}"
                )

    def __len__(self) -> int:
        return len(self._callers)

    def caller(self, peer: Mapping[str, Iterable[bytes]]) -> Caller | None:
        """Of what gRPC says of the peer. None: no name is known, or names of two tenants are."""
        names = {name.decode(errors="replace") for kind in _NAMES for name in peer.get(kind, ())}
        callers = [self._callers[name] for name in names if name in self._callers]
        if len({caller.tenant for caller in callers}) != 1:
            return None
        return max(callers, key=lambda caller: rank(caller.role))
