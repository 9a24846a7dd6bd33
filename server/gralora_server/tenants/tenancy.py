"""Who may what, as the newest settings have it: all of it is exchanged at once, and by something that works."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gralora_runtime.errors import ConfigError
from gralora_server.tenants.identities import Identities
from gralora_server.tenants.ownership import Ownership
from gralora_server.tenants.settings import TenancySettings


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """One state of it. Whoever needs two answers that agree asks one snapshot for both."""

    settings: TenancySettings
    identities: Identities
    ownership: Ownership


class Tenancy:
    """`current` may be read from any thread."""

    def __init__(
        self,
        settings: TenancySettings | None = None,
        *,
        token_file: Path | None = None,
        asks_for_certificates: bool = False,
    ) -> None:
        """`asks_for_certificates`: whether clients have to show one that an authority of ours has signed."""
        self._token_file = token_file
        self._asks_for_certificates = asks_for_certificates
        self.current = self._read(settings or TenancySettings())

    def prepare(self, settings: TenancySettings) -> Callable[[], None]:
        """See `Reloadable`. All files are read again. Raises ConfigError."""
        read = self._read(settings)

        def put() -> None:
            self.current = read

        return put

    def replace(self, settings: TenancySettings) -> None:
        """From the next call on. All files are read again. Raises ConfigError, and then nothing has changed."""
        self.prepare(settings)()

    def _read(self, settings: TenancySettings) -> Snapshot:
        identities = Identities(settings, token_file=self._token_file)
        if identities.reads_certificates and not self._asks_for_certificates:
            raise ConfigError("tenants are known by certificates, but no client authority says which are valid")
        return Snapshot(settings=settings, identities=identities, ownership=Ownership(settings))
