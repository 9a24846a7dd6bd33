"""Adapters of a model hub: a real server on loopback that breaks off, stalls and lies."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from huggingface_hub import constants, snapshot_download
from hypothesis import given
from hypothesis import strategies as st
from support.fake_hub import WEIGHTS, FakeHub
from support.faulty_server import Answer, Fault, serving

from gralora_runtime.adapters.catalogue.sources.downloads import UNFINISHED, Downloads
from gralora_runtime.adapters.catalogue.sources.fetch import Limits
from gralora_runtime.adapters.catalogue.sources.hub import HubSource
from gralora_runtime.adapters.catalogue.sources.remote_name import parse_name
from gralora_runtime.adapters.checkpoint.header import CONFIG_FILE
from gralora_runtime.errors import AdapterSourceError, ConfigError

FILES = {CONFIG_FILE: b'{"r": 8}', WEIGHTS: bytes(range(256)) * 1000, "golden.json": b"[]", "README.md": b"hello"}
FETCHED = {CONFIG_FILE, WEIGHTS, "golden.json"}
LIMITS = Limits(pause_s=0.0)
HOSTILE = [
    "",
    "/",
    "..",
    "../x",
    "org/../x",
    "org/..",
    ".org/x",
    "org/.x",
    "org//x",
    "/org/x",
    "org/x/",
    "org/x/y",
    "org/x@",
    "org/x@..",
    "org/x@a/b",
    "org/x@a@b",
    "org/x?y",
    "org/x#y",
    "org/x%2f..",
    "org/x\n",
    "org/x\0",
    "org/x y",
    "org\\x",
    "org/ẍ",
    "https://127.0.0.1/x",
    "org/" + "x" * 97,
    "org/a--b",  # a name that the hub's own rules refuse
]


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with serving(FakeHub()) as hub:
        yield hub


@contextmanager
def opening(
    hub: FakeHub,
    folder: Path,
    uri: str = "hf://org",
    *,
    limits: Limits = LIMITS,
    budget_bytes: int = 1 << 20,
    in_use: Callable[[Path], bool] = lambda path: False,
    token: str | None = None,
) -> Iterator[HubSource]:
    downloads = Downloads(folder, budget_bytes=budget_bytes, in_use=in_use, limits=limits, grace_s=0.0)
    source = HubSource(
        uri, downloads=downloads, follows=True, endpoint=hub.endpoint, token=token, allow_any=True, loopback_http=True
    )
    try:
        yield source
    finally:
        source.close()
        downloads.close()


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_an_adapter_is_found_and_only_its_files_are_fetched(hub: FakeHub, tmp_path: Path) -> None:
    sha = hub.commit("org/name", FILES)
    with opening(hub, tmp_path) as source:
        found = source.find("org/name")

    assert found is not None
    assert sha == found.revision
    assert (found.directory,) == found.roots
    assert {name: FILES[name] for name in FETCHED} == content(found.directory)
    assert hub.bodies("README.md") == []


def test_huggingface_hub_finds_it_in_the_same_cache(hub: FakeHub, tmp_path: Path) -> None:
    sha = hub.commit("org/name", FILES)
    with opening(hub, tmp_path) as source:
        found = source.find("org/name")
    assert found is not None

    theirs = snapshot_download("org/name", revision=sha, cache_dir=tmp_path / "hub", local_files_only=True)

    assert found.directory == Path(theirs)


def test_what_is_here_is_not_fetched_again(hub: FakeHub, tmp_path: Path) -> None:
    hub.commit("org/name", FILES)
    with opening(hub, tmp_path) as source:
        first = source.find("org/name")
        num_bodies = len(hub.bodies(WEIGHTS))

        assert first == source.find("org/name")
        assert num_bodies == len(hub.bodies(WEIGHTS)) == 1


def test_a_commit_that_is_here_is_not_asked_about(hub: FakeHub, tmp_path: Path) -> None:
    sha = hub.commit("org/name", FILES)
    with opening(hub, tmp_path) as source:
        first = source.find(f"org/name@{sha}")
        num_requests = len(hub.sent)
        hub.says = Answer(503)

        assert first == source.find(f"org/name@{sha}")
        assert num_requests == len(hub.sent)


@pytest.mark.parametrize("name", ["org/other", "org/name@other", "org/empty"])
def test_what_the_hub_does_not_have_is_not_found(hub: FakeHub, tmp_path: Path, name: str) -> None:
    hub.commit("org/name", FILES)
    hub.commit("org/empty", {"README.md": b"hello"})
    with opening(hub, tmp_path) as source:
        assert source.find(name) is None

    assert ["/api/models/" in sent.path for sent in hub.sent] == [True]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_reaches_nobody(hub: FakeHub, tmp_path: Path, name: str) -> None:
    with opening(hub, tmp_path, "hf://") as source:
        before = sorted(tmp_path.rglob("*"))

        assert source.find(name) is None
        assert hub.sent == []
        assert before == sorted(tmp_path.rglob("*"))


@given(st.text(alphabet="aZ09._-/@%\\:\0\n é", max_size=12))
def test_a_name_that_parses_has_nothing_in_it_that_leads_elsewhere(text: str) -> None:
    name = parse_name(text)

    if name is not None:
        assert text == name.repo + ("@" + name.revision if name.revision else "")
        assert not {"", ".", ".."} & {*name.repo.split("/"), name.folder}
        assert "/" not in name.folder + name.revision


@pytest.mark.parametrize(
    ("uri", "name", "served"),
    [
        ("hf://", "org/name", True),
        ("hf://org", "org/name", True),
        ("hf://org", "org/name@v1", True),
        ("hf://org", "evil/name", False),
        ("hf://org", "name", False),
        ("hf://org/name", "org/name", True),
        ("hf://org/name", "org/name@v1", False),
        ("hf://org/name", "org/other", False),
        ("hf://org/name@v1", "org/name", True),
        ("hf://org/name@v1", "org/name@v1", True),
        ("hf://org/name@v1", "org/name@main", False),
    ],
)
def test_a_source_serves_what_its_address_says(hub: FakeHub, tmp_path: Path, uri: str, name: str, served: bool) -> None:
    for repo in ("org/name", "org/other", "evil/name"):
        hub.commit(repo, FILES, refs=("main", "v1"))
    with opening(hub, tmp_path, uri) as source:
        assert served == (source.find(name) is not None)
        assert served == bool(hub.sent)


def test_a_pinned_source_serves_its_revision_under_both_names(hub: FakeHub, tmp_path: Path) -> None:
    old = hub.commit("org/name", FILES, refs=("v1",))
    hub.commit("org/name", {**FILES, CONFIG_FILE: b'{"r": 9}'})
    with opening(hub, tmp_path, "hf://org/name@v1") as source:
        assert list(source.names()) == ["org/name", "org/name@v1"]
        assert [old, old] == [source.find(name).revision for name in source.names()]


@pytest.mark.parametrize(
    "uri", ["hf://org/name/more", "hf://../x", "hf://org/", "hf:///name", "hf://org/name@", "hf://a b"]
)
def test_an_address_that_makes_no_sense_is_refused_at_start(hub: FakeHub, tmp_path: Path, uri: str) -> None:
    with pytest.raises(ConfigError, match="is neither"), opening(hub, tmp_path, uri):
        pass


def test_everybodys_adapters_must_be_asked_for(tmp_path: Path) -> None:
    downloads = Downloads(tmp_path, budget_bytes=1, in_use=lambda path: False, limits=LIMITS)
    with pytest.raises(ConfigError, match="names no organisation"):
        HubSource("hf://", downloads=downloads, follows=True)
    downloads.close()


@pytest.mark.parametrize("endpoint", ["http://hub.example", "http://127.0.0.1:1"])
def test_a_hub_is_asked_over_https_only(tmp_path: Path, endpoint: str) -> None:
    downloads = Downloads(tmp_path, budget_bytes=1, in_use=lambda path: False, limits=LIMITS)
    with pytest.raises(ConfigError, match="https only"):
        HubSource("hf://org", downloads=downloads, follows=True, endpoint=endpoint)
    downloads.close()


def test_a_cut_connection_goes_on_where_it_was(hub: FakeHub, tmp_path: Path) -> None:
    hub.commit("org/name", FILES)
    hub.faults[WEIGHTS] = Fault(cut_after=[100_000, 50_000])
    with opening(hub, tmp_path) as source:
        found = source.find("org/name")

    assert found is not None
    assert FILES[WEIGHTS] == (found.directory / WEIGHTS).read_bytes()
    bodies = hub.bodies(WEIGHTS)
    assert [sent.range for sent in bodies] == ["", "bytes=100000-", "bytes=150000-"]
    assert len(FILES[WEIGHTS]) == sum(sent.num_bytes for sent in bodies)


def test_a_server_without_ranges_begins_anew(hub: FakeHub, tmp_path: Path) -> None:
    hub.commit("org/name", FILES)
    hub.faults[WEIGHTS] = Fault(cut_after=[100_000], no_ranges=True)
    with opening(hub, tmp_path) as source:
        found = source.find("org/name")

    assert found is not None
    assert FILES[WEIGHTS] == (found.directory / WEIGHTS).read_bytes()


def test_a_server_that_stalls_is_given_up_and_the_next_attempt_goes_on(hub: FakeHub, tmp_path: Path) -> None:
    hub.commit("org/name", FILES)
    hub.faults[WEIGHTS] = Fault(stall_after=100_000)
    with opening(hub, tmp_path, limits=dataclasses.replace(LIMITS, stall_s=0.2)) as source:
        with pytest.raises(AdapterSourceError, match="sent nothing in time") as caught:
            source.find("org/name")
        assert LIMITS.retry_after_s == caught.value.retry_after_s
        del hub.faults[WEIGHTS]
        found = source.find("org/name")

    assert found is not None
    assert hub.bodies(WEIGHTS)[1].range == "bytes=100000-"
    assert FILES[WEIGHTS] == (found.directory / WEIGHTS).read_bytes()


def test_a_server_that_sends_a_byte_at_a_time_is_given_up(hub: FakeHub, tmp_path: Path) -> None:
    hub.commit("org/name", FILES)
    hub.faults[WEIGHTS] = Fault(drip=True)
    with (
        opening(hub, tmp_path, limits=dataclasses.replace(LIMITS, download_s=0.5)) as source,
        pytest.raises(AdapterSourceError, match=r"did not send all of it within 0\.5 s"),
    ):
        source.find("org/name")


def test_a_hub_that_never_answers_is_given_up(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.commit("org/name", FILES)
    monkeypatch.setattr(FakeHub, "info", lambda self, repo, sha: self.closing.wait())
    with (
        opening(hub, tmp_path, limits=dataclasses.replace(LIMITS, answer_s=0.2)) as source,
        pytest.raises(AdapterSourceError, match=r"did not answer within 0\.2 s"),
    ):
        source.find("org/name")


def test_a_hub_that_is_not_there_is_said(hub: FakeHub, tmp_path: Path) -> None:
    hub.port = 1  # nobody listens there
    with opening(hub, tmp_path) as source, pytest.raises(AdapterSourceError, match="cannot be reached"):
        source.find("org/name")


@pytest.mark.parametrize(
    ("answer", "problem", "retry_after_s"),
    [
        (Answer(503, {}, b""), "answered with status 503", LIMITS.retry_after_s),
        (Answer(429, {"Retry-After": "40"}, b""), "answered with status 429", 40.0),
        (Answer(403, {}, b""), "answered with status 403", LIMITS.retry_after_s),
        (Answer(403, {"X-Error-Code": "GatedRepo"}, b""), "granted access", LIMITS.retry_after_s),
        (Answer(200, {}, b"no json"), "describes no model", LIMITS.retry_after_s),
        (Answer(200, {}, b"[1]"), "describes no model", LIMITS.retry_after_s),
        (Answer(200, {}, b'{"id": "org/name", "siblings": [{}]}'), "describes no model", LIMITS.retry_after_s),
        (
            Answer(200, {}, b'{"id": "org/name", "sha": "../x", "siblings": [{"rfilename": "adapter_config.json"}]}'),
            "does not say the size and the hash of adapter_config.json",
            LIMITS.retry_after_s,
        ),
    ],
)
def test_an_answer_that_tells_nothing_is_no_answer(
    hub: FakeHub, tmp_path: Path, answer: Answer, problem: str, retry_after_s: float
) -> None:
    hub.says = answer
    with opening(hub, tmp_path) as source, pytest.raises(AdapterSourceError, match=problem) as caught:
        source.find("org/name")

    assert retry_after_s == caught.value.retry_after_s


def test_a_commit_that_is_no_commit_becomes_no_path(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.commit("org/name", FILES)
    info = FakeHub.info
    monkeypatch.setattr(FakeHub, "info", lambda self, repo, sha: {**info(self, repo, sha), "sha": "../../x"})
    with (
        opening(hub, tmp_path) as source,
        pytest.raises(AdapterSourceError, match=r"no commit for it but '\.\./\.\./x'"),
    ):
        source.find("org/name")


def test_a_name_that_leads_to_another_repository_is_not_found(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hub sends on from a repository's old name; what is there now was never allowed."""
    hub.commit("org/name", FILES)
    info = FakeHub.info
    monkeypatch.setattr(FakeHub, "info", lambda self, repo, sha: {**info(self, repo, sha), "id": "evil/name"})
    with opening(hub, tmp_path) as source:
        assert source.find("org/name") is None


def test_wrong_bytes_are_refused(hub: FakeHub, tmp_path: Path) -> None:
    hub.commit("org/name", FILES)
    hub.announced[WEIGHTS] = {"lfs": {"size": len(FILES[WEIGHTS]), "sha256": "0" * 64, "pointerSize": 134}}
    with opening(hub, tmp_path) as source:
        with pytest.raises(AdapterSourceError, match=f"sent a wrong {WEIGHTS}: its sha256 hash is"):
            source.find("org/name")
        hub.announced.clear()
        hub.announced[CONFIG_FILE] = {"blobId": "0" * 40}
        with pytest.raises(AdapterSourceError, match=f"sent a wrong {CONFIG_FILE}: its git hash is"):
            source.find("org/name")

    assert list(tmp_path.rglob(f"snapshots/*/{CONFIG_FILE}")) == []


def test_more_bytes_than_announced_are_refused(hub: FakeHub, tmp_path: Path) -> None:
    hub.commit("org/name", FILES)
    hub.announced[CONFIG_FILE] = {"size": 3}
    with opening(hub, tmp_path) as source, pytest.raises(AdapterSourceError, match="sends more than the 3 bytes"):
        source.find("org/name")


def test_a_file_that_cannot_be_had_is_said_with_when_to_ask_again(hub: FakeHub, tmp_path: Path) -> None:
    hub.commit("org/name", FILES)
    hub.faults[WEIGHTS] = Fault(status=503)
    with opening(hub, tmp_path) as source, pytest.raises(AdapterSourceError, match="status 503") as caught:
        source.find("org/name")

    assert caught.value.retry_after_s == 7.0


def test_nobody_is_sent_on_to_an_address_without_tls(hub: FakeHub, tmp_path: Path) -> None:
    hub.commit("org/name", FILES)
    hub.faults[WEIGHTS] = Fault(redirect="http://192.0.2.1/adapter_model.safetensors?signature=secret")
    with opening(hub, tmp_path) as source, pytest.raises(AdapterSourceError, match="which is not https") as caught:
        source.find("org/name")

    assert "secret" not in str(caught.value)


def test_a_token_is_sent_and_no_other_is_looked_for(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "from-the-environment")
    hub.commit("org/name", FILES)
    with opening(hub, tmp_path / "a", token="given") as source:
        source.find("org/name")
    assert {"Bearer given"} == {sent.headers.get("authorization", "") for sent in hub.sent}
    hub.sent.clear()
    with opening(hub, tmp_path / "b") as source:
        source.find("org/name")

    assert {""} == {sent.headers.get("authorization", "") for sent in hub.sent}


def test_a_token_does_not_follow_to_another_host(hub: FakeHub, tmp_path: Path) -> None:
    hub.commit("org/name", FILES)
    hub.faults[WEIGHTS] = Fault(redirect=f"http://localhost:{hub.port}/org/name/resolve/main/golden.json")
    with opening(hub, tmp_path, token="given") as source, pytest.raises(AdapterSourceError):
        source.find("org/name")

    elsewhere = [request for request in hub.sent if request.headers["host"].startswith("localhost")]
    assert elsewhere
    assert {request.headers.get("authorization") for request in elsewhere} == {None}


def test_a_machine_that_is_set_offline_says_so(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.commit("org/name", FILES)
    with opening(hub, tmp_path) as source, pytest.raises(AdapterSourceError, match="HF_HUB_OFFLINE is set"):
        source.find("org/name")


def test_a_new_revision_is_another_directory_and_the_old_one_stays_while_it_is_used(
    hub: FakeHub, tmp_path: Path
) -> None:
    num_bytes = sum(len(FILES[name]) for name in FETCHED)
    busy: set[Path] = set()
    hub.commit("org/name", FILES)
    with opening(hub, tmp_path, budget_bytes=2 * num_bytes, in_use=busy.__contains__) as source:
        old = source.find("org/name")
        assert old is not None
        busy.add(old.directory)
        newer = hub.commit("org/name", {**FILES, CONFIG_FILE: b'{"r": 9}'})
        new = source.find("org/name")
        assert new is not None
        newest = hub.commit("org/name", {**FILES, CONFIG_FILE: b'{"r": 7}'})
        last = source.find("org/name")
        assert last is not None

        assert [newer, newest] == [new.revision, last.revision]
        assert [found.directory.exists() for found in (old, new, last)] == [True, False, True]
        busy.clear()
        hub.commit("org/other", FILES)
        source.find("org/other")
        assert not old.directory.exists()


def test_an_adapter_over_the_budget_is_refused_before_a_byte_is_fetched(hub: FakeHub, tmp_path: Path) -> None:
    hub.commit("org/name", FILES)
    no_room = pytest.raises(AdapterSourceError, match="budget of 1000 bytes has no room")
    with opening(hub, tmp_path, budget_bytes=1000) as source, no_room:
        source.find("org/name")

    assert hub.bodies(CONFIG_FILE) + hub.bodies(WEIGHTS) == []
    assert list((tmp_path / UNFINISHED).iterdir()) == []
