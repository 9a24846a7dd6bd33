"""A few hundred mutated requests and configurations of one seed; `make fuzz` sends a hundred thousand."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from benchmarks.fuzz import campaign
from benchmarks.fuzz.caller import Caller
from benchmarks.fuzz.configs import ACCEPTED, REFUSED, Configs, read, run, seed_text
from benchmarks.fuzz.methods import Method, methods
from benchmarks.fuzz.mutants import Mutant, Mutants
from benchmarks.fuzz.stand import Stand
from benchmarks.fuzz.verdict import Ending
from gralora_server.client import AsyncClient
from gralora_server.loadtest.local_server import LocalServer

SEED, NUM_REQUESTS, NUM_CONFIGS = 7, 400, 300
SOME_STEPS = 20  # more than the first answer takes: mutated requests are under way
# An adapter that was removed comes back with another number, which the seeds do not know.
LAST = ("UnloadAdapter", "RepositoryModelLoad", "RepositoryModelUnload", "LoadLora", "UnloadLora")
METHODS = sorted(methods(), key=lambda method: LAST.index(method.name) if method.name in LAST else -1)
NEEDS_MORE = {"RollbackAdapter"}  # than one version


@pytest.fixture(scope="module")
def stand(tmp_path_factory: pytest.TempPathFactory) -> Stand:
    return Stand.write(tmp_path_factory.mktemp("fuzz"))


@pytest.fixture(scope="module")
def server(stand: Stand) -> Iterator[LocalServer]:
    with stand.server() as server:
        yield server


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
async def test_what_mutations_begin_with_is_a_valid_request(stand: Stand, server: LocalServer, method: Method) -> None:
    """Or else they would all be refused for the same reason."""
    endings = []
    async with Caller(server.address) as caller:
        for number in range(4):
            messages = stand.seeds.draw(random.Random(number), method)
            parts = tuple(message.SerializeToString() for message in messages)
            endings.append(await caller.send(Mutant(method, parts)))

    accepted = Ending(code=grpc.StatusCode.OK) in endings
    assert accepted or method.name in NEEDS_MORE, endings


async def test_mutated_requests_do_no_harm(stand: Stand, server: LocalServer) -> None:
    mutants = Mutants(SEED, METHODS, stand.seeds)

    report = await campaign.run(stand, server, mutants, requests=NUM_REQUESTS, seconds=60.0)

    assert report.problems == []
    assert report.requests == NUM_REQUESTS
    assert report.probes == NUM_REQUESTS // campaign.PROBE_EVERY
    assert {method for method, _ in report.saw} == {method.name for method in METHODS}
    assert {label for _, label in report.saw} > {"OK", "INVALID_REQUEST", "ADAPTER_NOT_FOUND"}


def test_a_request_is_the_same_each_time_and_can_be_kept(stand: Stand, tmp_path: Path) -> None:
    mutants = Mutants(SEED, METHODS, stand.seeds)
    for number in range(50):
        mutant = mutants.make(number)
        mutant.write(tmp_path / "kept")

        assert mutants.make(number) == mutant
        assert Mutant.read(tmp_path / "kept", METHODS) == mutant


def test_mutated_configurations_are_read_or_refused(tmp_path: Path) -> None:
    findings = run(Configs(SEED), tmp_path, number=NUM_CONFIGS, seconds=60.0)

    assert findings.problems == {}
    assert findings.configs == NUM_CONFIGS
    assert findings.saw.keys() == {ACCEPTED, REFUSED}


def test_what_configurations_begin_with_is_right(tmp_path: Path) -> None:
    file = tmp_path / "gralora.toml"
    file.write_text(seed_text())

    assert read(file).label == ACCEPTED


def test_a_configuration_that_raises_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_layers: object) -> None:
        raise KeyError("tenants")

    monkeypatch.setattr("benchmarks.fuzz.configs.Layers.read", fail)

    assert read(tmp_path / "gralora.toml").problem == "KeyError: 'tenants'"


async def test_a_server_that_dies_is_noticed(stand: Stand, server: LocalServer) -> None:
    """The last test of this file: the server is not there any more."""
    mutants = Mutants(SEED, METHODS, stand.seeds)
    async with AsyncClient(server.address) as client:
        before = await client.load()
        running = asyncio.create_task(campaign.run(stand, server, mutants, requests=10**6, seconds=60.0))
        while (await client.load()).steps < before.steps + SOME_STEPS:
            pass
    server.process.kill()
    report = await running

    assert "the server died" in report.problems
    assert report.offenders
