"""A real server that is killed again and again while two clients write: what it acknowledged is there, and no rest.

`GRALORA_TEST_THOROUGH=1` kills a hundred times.
"""

from __future__ import annotations

import hashlib
import json
import queue
import random
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from support.litter import litter
from support.lives import Lives
from support.name_model import NameModel
from support.peft_adapters import gralora_config
from support.pipelined import SERVE_OPTIONS
from support.thorough import MANY
from support.uploading import until
from support.workspaces import save_workspace

from gralora_server import Client
from gralora_server.client import Adapter, FailedPreconditionError, NotFoundError, UnavailableError

NUM_LIVES = 100 if MANY else 3
SEED = 11
CONTENTS = range(5)  # fewer than versions are kept, so that none is removed
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LONG_S = 60.0
ASKED = {"max_tokens": 8, "temperature": 0.0, "ignore_eos": True}


@dataclass(slots=True)
class Contents:
    """Adapters of one shape whose weights and answers all differ."""

    folder: Path
    digests: dict[int, str] = field(default_factory=dict)
    tokens: dict[int, tuple[int, ...]] = field(default_factory=dict)

    def path(self, content: int) -> Path:
        return self.folder / f"c{content}"

    def of(self, digest: str) -> int:
        return next((content for content, known in self.digests.items() if known == digest), -1)

    def learn(self, client: Client) -> None:
        """From a server that nobody has killed yet."""
        for content in CONTENTS:
            generation = client.generate("the quick", adapter=f"c{content}", **ASKED)
            self.digests[content], self.tokens[content] = generation.adapter_digest, generation.token_ids
        assert len(set(self.digests.values())) == len(set(self.tokens.values())) == len(CONTENTS)


class Writer:
    """A client with two names of its own: one that it pushes, and one whose files it changes."""

    def __init__(self, number: int, contents: Contents) -> None:
        self.contents = contents
        self.names = {f"pushed{number}": NameModel(), f"files{number}": NameModel()}
        self.pending: tuple[str, NameModel] | None = None  # not acknowledged, so that it may have happened or not
        self.pushes: set[tuple[str, int]] = set()  # that broke off
        self.acknowledged = 0
        self._random = random.Random(SEED + number)

    def write_until_killed(self, address: str, told: queue.SimpleQueue[str]) -> None:
        with Client(address) as client:
            while True:
                name = self._random.choice(tuple(self.names))
                try:
                    self._write(client, name)
                except UnavailableError:
                    return
                self.acknowledged += 1
                told.put(name)

    def _write(self, client: Client, name: str) -> None:
        now = self.names[name]
        others = [number for number in now.versions if number != now.promoted]
        kinds = ["content", "pin"] if now.versions else ["content"]
        kinds += ["promote", "promote", "canary"] if others else []
        kinds += ["roll back"] if now.previous else []
        kind = self._random.choice(kinds)
        number = self._random.choice(others) if others else 0
        after = deepcopy(now)
        self.pending = name, after
        adapters = client.adapters
        if kind == "content":
            answer = self._bring(client, name, after, self._random.choice(CONTENTS))
        elif kind == "pin":
            after.pinned = not now.pinned
            answer = adapters.pin(name, pinned=after.pinned)
        elif kind == "promote":
            after.stand_for(number)
            answer = adapters.promote(name, str(number))
        elif kind == "roll back":
            after.stand_for(now.previous)
            answer = adapters.rollback(name)
        else:
            after.canary = None if now.canary else (number, 1.0)
            answer = adapters.set_canary(name, str(number), 1.0 if after.canary else 0.0)
        assert self.fields_of(answer) == self.expected(after), (name, kind, now)
        self.names[name], self.pending = after, None

    def _bring(self, client: Client, name: str, after: NameModel, content: int) -> Adapter:
        if name.startswith("pushed"):
            after.uploaded = content
            after.see(content)
            self.pushes.add((name, content))
            answer = client.adapters.push(self.contents.path(content), name)
            self.pushes.discard((name, content))
            return answer
        put(self.contents.path(content), self.contents.folder / name)
        self.names[name].on_disk = after.on_disk = content  # whoever hears of it
        after.see(content)
        return client.adapters.load(name)

    def expected(self, model: NameModel) -> tuple[object, ...]:
        return model.promoted, model.previous, model.pinned, model.canary or (0, 0.0), model.versions

    def fields_of(self, adapter: Adapter) -> tuple[object, ...]:
        versions = {version.number: self.contents.of(version.digest) for version in adapter.versions}
        canary = adapter.canary_version, adapter.canary_share
        return adapter.version, adapter.previous_version, adapter.pinned, canary, versions

    def check(self, client: Client) -> None:
        """All that was acknowledged is there; of what was not, all or nothing."""
        pending_name, pending = self.pending or ("", NameModel())
        for name, known in self.names.items():
            candidates = [known, pending] if name == pending_name else [known]
            found = self._find(client, name, is_settled=len(candidates) == 1 and known.on_disk is None)
            for candidate in candidates:
                if candidate.on_disk is not None:
                    candidate.see(candidate.on_disk)
            fitting = [candidate for candidate in candidates if self.expected(candidate) == found]
            assert fitting, f"{name}: {found} is none of {candidates}"
            if len({candidate.newest for candidate in fitting}) > 1:
                fitting = self._push_again(client, name, pending, fitting)
            self.names[name] = fitting[-1]
            self._check_answers(client, name, fitting[-1])
        self.pending = None

    def _push_again(self, client: Client, name: str, pending: NameModel, alike: list[NameModel]) -> list[NameModel]:
        """As a client would that got no answer: what was sent last cannot be seen, but matters to the next push."""
        assert pending.uploaded is not None
        answer = self.fields_of(client.adapters.push(self.contents.path(pending.uploaded), name))
        for candidate in alike:
            candidate.uploaded = pending.uploaded
            candidate.see(pending.uploaded)
        fitting = [candidate for candidate in alike if self.expected(candidate) == answer]
        assert fitting, f"{name}: {answer} is none of {alike}"
        return fitting

    def _find(self, client: Client, name: str, *, is_settled: bool) -> tuple[object, ...]:
        try:
            if not is_settled:  # a server hears by itself of what its catalogue missed, but beside serving
                client.adapters.load(name)
            return self.fields_of(client.adapters.get(name))
        except NotFoundError:
            return self.expected(NameModel())

    def _check_answers(self, client: Client, name: str, model: NameModel) -> None:
        for number in [0, *model.versions] if model.versions else ():
            content = model.versions[number or model.served]
            try:
                generation = client.generate("the quick", adapter=f"{name}@{number}" if number else name, **ASKED)
            except FailedPreconditionError as error:
                # Files that were overwritten before there was a copy of them: of nobody who pushes.
                if error.reason != "ADAPTER_VERSION_LOST" or model.on_disk in (None, content):
                    raise
                continue
            assert generation.adapter_version == (number or model.served), (name, number)
            assert generation.adapter_digest == self.contents.digests[content], (name, number)
            assert generation.token_ids == self.contents.tokens[content], (name, number)


def put(adapter: Path, directory: Path) -> None:
    """The weights in one step; the rest is the same in all of them."""
    directory.mkdir(exist_ok=True)
    for file in (CONFIG, WEIGHTS):
        shutil.copy(adapter / file, directory.parent / f".{directory.name}-{file}")
        (directory.parent / f".{directory.name}-{file}").replace(directory / file)


def check_what_is_left(state: Path, writers: list[Writer]) -> None:
    """Nothing but the catalogue, the usage, what is whole, and the uploads that broke off, to go on from."""
    names = {path.name for path in state.iterdir()}
    catalogue = {"catalogue.sqlite", "catalogue.sqlite-wal", "catalogue.sqlite-shm", "catalogue.lock"}
    usage = {"usage.sqlite", "usage.sqlite-wal"}
    assert names <= catalogue | usage | {"uploads", "versions", "downloads"}
    until(lambda: not any((state / "versions" / "tmp").iterdir()))  # copies are made beside serving
    assert {path.name for path in (state / "downloads").iterdir()} == {".lock", "tmp"}
    assert not any((state / "downloads" / "tmp").iterdir())
    for unfinished in (state / "uploads" / "tmp").iterdir():
        manifest = json.loads((unfinished / "manifest.json").read_text())
        of_content = [content for name, content in pushes_of(writers) if name == manifest["name"]]
        assert weights_of(manifest) in [hash_of(writers[0].contents.path(content)) for content in of_content]
    for folder in (state / "uploads").iterdir():
        if folder.name not in ("tmp", ".lock"):
            digests = json.loads((folder / "record.json").read_text())["digests"]
            assert {path.name for path in folder.iterdir()} == {"record.json", *digests}


def pushes_of(writers: list[Writer]) -> set[tuple[str, int]]:
    return {push for writer in writers for push in writer.pushes}


def weights_of(manifest: dict[str, object]) -> str:
    return next(file["sha256"] for file in manifest["files"] if file["name"] == WEIGHTS)


def hash_of(adapter: Path) -> str:
    return hashlib.sha256((adapter / WEIGHTS).read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def lives() -> Iterator[Lives]:
    with Lives() as lives:
        yield lives


def test_what_was_acknowledged_survives_kill_9_at_any_moment(lives: Lives, tmp_path: Path) -> None:
    save_workspace(tmp_path, {f"c{content}": gralora_config("llama", 4, 2) for content in CONTENTS})
    model, adapters, state = tmp_path / "model", tmp_path / "adapters", tmp_path / "state"
    options = ("--model", model, "--adapters", adapters, "--state-dir", state, "--address", "127.0.0.1:0", "--json")
    options += ("--threads", "1", "--log-level", "error", "--adapter-pool-bytes", 8 << 20, *SERVE_OPTIONS)
    rng, contents = random.Random(SEED), Contents(adapters)
    writers = [Writer(number, contents) for number in range(2)]
    told: queue.SimpleQueue[str] = queue.SimpleQueue()
    with ThreadPoolExecutor(len(writers)) as threads:
        for life in range(NUM_LIVES + 1):
            server = lives.start(*options)
            if rng.random() < 0.2:  # it does not even begin to serve
                time.sleep(rng.uniform(0, 2))
                lives.kill(server)
                server = lives.start(*options)
            address = lives.address()
            with Client(address) as client:
                if life == 0:
                    contents.learn(client)
                for writer in writers:
                    writer.check(client)
            check_what_is_left(state, writers)
            writing = [threads.submit(writer.write_until_killed, address, told) for writer in writers]
            for _ in range(rng.randrange(1, 40)):
                told.get(timeout=LONG_S)
            time.sleep(rng.uniform(0, 0.05))  # somewhere in whatever they do
            lives.kill(server)
            litter(state)
            for each in writing:
                each.result(LONG_S)

    assert all(writer.acknowledged > NUM_LIVES for writer in writers), "they lived long enough"
