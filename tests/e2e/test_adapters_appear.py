"""As a new user: an adapter is put somewhere, and its first request is answered, with no command in between."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from e2e.conftest import assert_idle, serving
from gralora_server import Client
from gralora_server.client import AdapterState, NotFoundError

WAIT_S = 20.0


@dataclass(frozen=True, slots=True)
class Place:
    """A server of one's own, and where its adapters come from."""

    client: Client
    adapters: Path
    hub: Path
    allowed: Path
    originals: Path  # adapters that PEFT wrote

    def tokens(self, adapter: str) -> tuple[int, ...]:
        return self.client.generate(token_ids=[1, 2, 3], adapter=adapter, max_tokens=8, temperature=0.0).token_ids


@pytest.fixture(scope="module")
def place(tiny_workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    root = tmp_path_factory.mktemp("sources")
    adapters, hub, allowed = root / "adapters", root / "hub", root / "elsewhere"
    for folder in (adapters, hub, allowed):
        folder.mkdir()
    options = ["--adapters", hub, "--allow-root", allowed, "--state-dir", root / "state", "--threads", "1"]
    with serving(tiny_workspace / "model", adapters, *map(str, options)) as address, Client(address) as client:
        yield Place(client, adapters, hub, allowed, tiny_workspace / "adapters")
        assert_idle(client)


def put(original: Path, target: Path) -> None:
    """A directory appears as a whole, as by `mv`."""
    fresh = target.with_name(f".{target.name}")
    shutil.copytree(original, fresh)
    fresh.rename(target)


def follow(place: Place, name: str, version: int) -> None:
    """The system tells the server of changed files within a moment, not at once."""
    deadline_s = time.monotonic() + WAIT_S
    while place.client.adapters.get(name).version != version:
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def test_copied_in(place: Place) -> None:
    with pytest.raises(NotFoundError):
        place.tokens("copied")
    put(place.originals / "a0", place.adapters / "copied")
    (place.adapters / "acme").mkdir()
    put(place.originals / "a1", place.adapters / "acme" / "copied")
    time.sleep(1.1)  # an answer of "not found" is believed for a second

    assert place.tokens("copied") != place.tokens("acme/copied") != place.tokens("")


def test_linked_in_as_volumes_of_kubernetes_are(place: Place) -> None:
    """The mounted name is a link to `..data`, which is a link to the directory of the day."""
    put(place.originals / "a0", place.adapters / "..2026_11_29")
    (place.adapters / "..data").symlink_to("..2026_11_29")
    (place.adapters / "mounted").symlink_to("..data")
    first = place.tokens("mounted")
    put(place.originals / "a1", place.adapters / "..2026_11_30")
    (place.adapters / "..new").symlink_to("..2026_11_30")
    (place.adapters / "..new").rename(place.adapters / "..data")
    second = place.client.adapters.load("mounted")

    assert second.version == 2
    assert place.tokens("mounted") == place.tokens("mounted@2") != first
    assert place.tokens("mounted@1") == first


def test_linked_to_where_the_operator_allows_it_and_nowhere_else(place: Place, tmp_path: Path) -> None:
    put(place.originals / "a0", place.allowed / "shared")
    put(place.originals / "a0", tmp_path / "private")
    (place.adapters / "linked").symlink_to(place.allowed / "shared")
    (place.adapters / "sneaky").symlink_to(tmp_path / "private")

    assert place.tokens("linked") != place.tokens("")
    with pytest.raises(Exception, match="leaves the adapters directory"):
        place.tokens("sneaky")


def test_in_the_hubs_cache(place: Place) -> None:
    repository = place.hub / "models--acme--poet"
    for sha, original in (("1" * 40, "a0"), ("2" * 40, "a1")):
        snapshot = repository / "snapshots" / sha
        snapshot.mkdir(parents=True)
        (repository / "blobs").mkdir(exist_ok=True)
        for file in (place.originals / original).iterdir():
            blob = repository / "blobs" / f"{sha[0]}-{file.name}"
            shutil.copy(file, blob)
            (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("1" * 40)

    assert place.tokens("acme/poet") == place.tokens(f"acme/poet@{'1' * 40}") != place.tokens(f"acme/poet@{'2' * 40}")
    (repository / "refs" / "main").write_text("2" * 40)
    follow(place, "acme/poet", 2)
    assert place.tokens("acme/poet") == place.tokens(f"acme/poet@{'2' * 40}")


def test_retrained_promoted_rolled_back_and_tried_on_some(place: Place) -> None:
    put(place.originals / "a0", place.adapters / "retrained")
    first = place.client.generate(token_ids=[1, 2, 3], adapter="retrained", max_tokens=8, temperature=0.0)
    fresh = place.adapters / ".fresh"
    shutil.copytree(place.originals / "a1", fresh)
    for file in fresh.iterdir():
        file.replace(place.adapters / "retrained" / file.name)
    follow(place, "retrained", 2)
    second = place.client.generate(token_ids=[1, 2, 3], adapter="retrained", max_tokens=8, temperature=0.0)

    assert (first.adapter, first.adapter_version, second.adapter_version) == ("retrained", 1, 2)
    assert first.adapter_digest != second.adapter_digest
    assert place.tokens(f"retrained@sha256:{first.adapter_digest[:12]}") == first.token_ids != second.token_ids
    assert place.client.adapters.rollback("retrained").version == 1
    place.client.adapters.set_canary("retrained", "2", 0.5)
    keys = [f"user-{i}" for i in range(20)]

    def version_for(key: str) -> int:
        return place.client.generate(token_ids=[1], adapter="retrained", max_tokens=1, canary_key=key).adapter_version

    served = [version_for(key) for key in keys]
    assert set(served) == {1, 2}
    assert served == [version_for(key) for key in keys]
    assert place.client.adapters.promote("retrained").version == 2


def test_watched_by_a_router(place: Place) -> None:
    put(place.originals / "a0", place.adapters / "watched")
    news = place.client.adapters.watch("watched")
    states: list[AdapterState] = []
    for told in news:
        states += [adapter.state for adapter in told.adapters]
        if told.synced and not states:
            place.tokens("watched")
        if AdapterState.RESIDENT in states:
            break
    place.client.adapters.unload("watched")
    removed = next(told.removed for told in news if told.removed)

    assert removed == ("watched",)
