"""Which source an operator's address means. Knows no more of a source than its scheme and what it is made with."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from gralora_runtime.adapters.catalogue.sources.downloads import Downloads
from gralora_runtime.adapters.catalogue.sources.s3_access import S3Access
from gralora_runtime.adapters.catalogue.sources.source import Source
from gralora_runtime.adapters.catalogue.sources.unpack import ArchiveLimits
from gralora_runtime.errors import ConfigError

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceSettings:
    """What sources need besides their address."""

    follows: bool
    allow_roots: tuple[Path, ...] = ()  # where links of local directories may end besides their own
    hub_endpoint: str = "https://huggingface.co"
    hub_token: str | None = None
    hub_allow_any: bool = False
    s3: S3Access = field(default_factory=S3Access)
    allow_archives: bool = False
    archives: ArchiveLimits = field(default_factory=ArchiveLimits)


def open_source(uri: str, *, settings: SourceSettings, downloads: Downloads | None) -> Source:
    """`downloads` may be missing where every source is a directory of this machine."""
    match = _SCHEME.match(uri)
    if match is None:
        return _directory(uri, settings)
    scheme = match[1]
    if scheme not in {"hf", "s3", "https"}:
        raise ConfigError(f"{uri}: adapters come from a directory, hf://, s3:// or https://, not from {scheme}://")
    if downloads is None:
        raise ConfigError(f"{uri}: needs a folder for downloads")
    if scheme == "hf":
        return _hub(uri, settings, downloads)
    return _s3(uri, settings, downloads) if scheme == "s3" else _https(uri, settings, downloads)


def _directory(path: str, settings: SourceSettings) -> Source:
    from gralora_runtime.adapters.catalogue.sources.directory import DirectorySource

    return DirectorySource(Path(path), allow_roots=settings.allow_roots, follows=settings.follows)


def _hub(uri: str, settings: SourceSettings, downloads: Downloads) -> Source:
    from gralora_runtime.adapters.catalogue.sources.hub import HubSource

    return HubSource(
        uri,
        downloads=downloads,
        follows=settings.follows,
        endpoint=settings.hub_endpoint,
        token=settings.hub_token,
        allow_any=settings.hub_allow_any,
    )


def _s3(uri: str, settings: SourceSettings, downloads: Downloads) -> Source:
    try:
        from gralora_runtime.adapters.catalogue.sources.s3 import S3Source
    except ModuleNotFoundError as cause:
        raise ConfigError(f"{uri}: needs {cause.name}; run: pip install 'gralora-server[s3]'") from cause

    return S3Source(uri, downloads=downloads, follows=settings.follows, access=settings.s3)


def _https(uri: str, settings: SourceSettings, downloads: Downloads) -> Source:
    if not settings.allow_archives:
        raise ConfigError(f"{uri}: archives from web servers are not allowed by these settings")
    from gralora_runtime.adapters.catalogue.sources.archive import HttpsSource

    return HttpsSource(uri, downloads=downloads, follows=settings.follows, archives=settings.archives)
