"""An operator's address becomes a source, or one line that says what to do."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

from gralora_runtime.adapters.catalogue.sources.archive import HttpsSource
from gralora_runtime.adapters.catalogue.sources.choice import SourceSettings, open_source
from gralora_runtime.adapters.catalogue.sources.downloads import Downloads
from gralora_runtime.adapters.catalogue.sources.fetch import Limits
from gralora_runtime.adapters.catalogue.sources.hub import HubSource
from gralora_runtime.adapters.catalogue.sources.s3 import S3Source
from gralora_runtime.adapters.catalogue.sources.s3_access import S3Access
from gralora_runtime.errors import ConfigError

SETTINGS = SourceSettings(follows=True, allow_archives=True, s3=S3Access(endpoint="http://127.0.0.1:1", anonymous=True))


@pytest.fixture
def downloads(tmp_path: Path) -> Iterator[Downloads]:
    downloads = Downloads(tmp_path, budget_bytes=1, in_use=lambda path: False, limits=Limits())
    yield downloads
    downloads.close()


@pytest.mark.parametrize(
    ("uri", "kind"),
    [("hf://org", HubSource), ("s3://bucket/prefix", S3Source), ("https://host/{name}.zip", HttpsSource)],
)
@pytest.mark.parametrize("follows", [True, False])
def test_a_scheme_means_a_source(downloads: Downloads, uri: str, kind: type, follows: bool) -> None:
    settings = SourceSettings(follows=follows, allow_archives=True, s3=SETTINGS.s3)
    source = open_source(uri, settings=settings, downloads=downloads)
    source.close()

    assert type(source) is kind
    assert (source.uri, source.follows) == (uri, follows)


@pytest.mark.parametrize("uri", ["hf://org", "s3://bucket/prefix", "https://host/{name}.zip"])
def test_a_remote_needs_a_folder_for_downloads(uri: str) -> None:
    with pytest.raises(ConfigError, match="needs a folder for downloads"):
        open_source(uri, settings=SETTINGS, downloads=None)


@pytest.mark.parametrize("uri", ["http://host/{name}.zip", "ftp://host", "HF://org", "file:///adapters"])
def test_another_scheme_is_refused_and_the_known_ones_are_named(downloads: Downloads, uri: str) -> None:
    with pytest.raises(ConfigError, match="adapters come from a directory, hf://, s3:// or https://"):
        open_source(uri, settings=SETTINGS, downloads=downloads)


def test_archives_are_off_unless_they_are_asked_for(downloads: Downloads) -> None:
    with pytest.raises(ConfigError, match="are not allowed"):
        open_source("https://host/{name}.zip", settings=SourceSettings(follows=True), downloads=downloads)


def test_a_missing_library_is_said_with_the_command_that_brings_it(
    downloads: Downloads, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "gralora_runtime.adapters.catalogue.sources.s3")
    monkeypatch.setitem(sys.modules, "s3fs", None)

    with pytest.raises(ConfigError) as caught:
        open_source("s3://bucket", settings=SETTINGS, downloads=downloads)

    assert str(caught.value) == "s3://bucket: needs s3fs; run: pip install 'gralora-server[s3]'"


def test_a_plain_path_is_a_directory_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass
    class Directory:
        path: Path
        allow_roots: tuple[Path, ...]
        follows: bool

    module = ModuleType("directory")
    module.DirectorySource = Directory
    monkeypatch.setitem(sys.modules, "gralora_runtime.adapters.catalogue.sources.directory", module)
    settings = SourceSettings(follows=False, allow_roots=(tmp_path,))

    opened = open_source("adapters/of mine", settings=settings, downloads=None)

    assert opened == Directory(Path("adapters/of mine"), (tmp_path,), False)
