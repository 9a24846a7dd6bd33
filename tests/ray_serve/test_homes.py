"""Which replica gets a request: the same at every proxy, evenly many adapters at each, and no crowd at one of them."""

from __future__ import annotations

import asyncio
from collections import Counter
from random import Random

import pytest

from gralora_server.ray.affinity import plain
from gralora_server.ray.homes import UnderWay, most, order

REPLICAS = ("k3j9x0qa", "o8qu74w9", "3a3jks1w", "v05mzk2e", "p1w8d7ht")  # as Serve calls them
ADAPTERS = [f"adapter-{number:03}" for number in range(1000)]


def homes(adapters: list[str], replicas: tuple[str, ...]) -> dict[str, str]:
    """Of an idle fleet."""
    return {adapter: order(adapter, dict.fromkeys(replicas, 0))[0] for adapter in adapters}


def test_homes_are_the_same_everywhere_and_for_ever() -> None:
    """Another hash would have every adapter loaded anew, and proxies of two versions would disagree."""
    found = order("poet", dict.fromkeys(REPLICAS, 0))

    assert found == ["p1w8d7ht", "o8qu74w9", "v05mzk2e", "3a3jks1w", "k3j9x0qa"]
    assert order("poet", dict.fromkeys(reversed(REPLICAS), 0)) == found


@pytest.mark.parametrize(("adapters", "at_most"), [(16, 2.0), (1000, 1.15)])
@pytest.mark.parametrize("replicas", [2, 3, 5])
def test_adapters_are_spread_evenly(adapters: int, replicas: int, at_most: float) -> None:
    found = Counter(homes(ADAPTERS[:adapters], REPLICAS[:replicas]).values())

    assert len(found) == replicas
    assert max(found.values()) <= at_most * adapters / replicas


@pytest.mark.parametrize("replicas", [2, 3, 4])
def test_only_what_is_at_home_there_moves_when_a_replica_comes_or_goes(replicas: int) -> None:
    fewer, more = homes(ADAPTERS, REPLICAS[:replicas]), homes(ADAPTERS, REPLICAS[: replicas + 1])
    moved = {adapter for adapter in ADAPTERS if fewer[adapter] != more[adapter]}

    assert moved == {adapter for adapter in ADAPTERS if more[adapter] == REPLICAS[replicas]}
    assert len(moved) <= 1.15 * len(ADAPTERS) / (replicas + 1)


def test_what_others_get_is_spread_too() -> None:
    """What one replica cannot take does not all go to the same other one."""
    full = dict.fromkeys(REPLICAS, 0) | {REPLICAS[0]: 100}
    found = Counter(order(name, full)[0] for name, home in homes(ADAPTERS, REPLICAS).items() if home == REPLICAS[0])

    assert set(found) == set(REPLICAS[1:])
    assert max(found.values()) <= 1.5 * found.total() / len(found)


@pytest.mark.parametrize("replicas", [1, 2, 3, 5])
@pytest.mark.parametrize("adapters", [1, 16])
def test_no_replica_gets_much_more_than_the_others(replicas: int, adapters: int) -> None:
    loads = dict.fromkeys(REPLICAS[:replicas], 0)
    chosen = Random(7)
    for number in range(1, 201):
        replica = order(chosen.choice(ADAPTERS[:adapters]), loads)[0]
        loads[replica] += 1

        assert loads[replica] <= most(number, replicas)


def test_a_burst_of_sixteen_for_one_replica_leaves_a_quarter_to_the_other() -> None:
    loads = dict.fromkeys(REPLICAS[:2], 0)
    for _ in range(16):
        loads[order("poet", loads)[0]] += 1

    assert sorted(loads.values()) == [4, 12]


def test_everybody_is_asked_in_the_end() -> None:
    loads = {replica: 100 * number for number, replica in enumerate(REPLICAS)}

    assert sorted(order("poet", loads)) == sorted(REPLICAS)
    assert order("poet", {"alone": 1000}) == ["alone"]


def test_few_requests_stay_at_home_however_idle_the_others_are() -> None:
    (home, *others) = order("poet", dict.fromkeys(REPLICAS[:2], 0))

    assert order("poet", {home: 3, others[0]: 0})[0] == home


@pytest.mark.parametrize(
    ("reference", "name"),
    [
        ("poet@3", "poet"),
        ("poet@sha256:0123456789ab", "poet"),
        ("org/poet@main", "org/poet@main"),
        ("no name", "no name"),
    ],
)
def test_versions_are_at_home_together(reference: str, name: str) -> None:
    assert plain(reference) == name


async def test_a_request_counts_from_its_choice_until_its_end() -> None:
    under_way = UnderWay()
    pending = asyncio.get_running_loop().create_future()
    under_way.choose(pending, "a")
    chosen = under_way.loads("ab")
    under_way.choose(pending, "b")  # a could not take it
    again = under_way.loads("ab")
    pending.set_result(None)
    under_way.send("b")
    await asyncio.sleep(0)  # callbacks of futures come a turn later
    sent = under_way.loads("ab")
    under_way.end("b")

    assert (chosen, again, sent) == ({"a": 1, "b": 0}, {"a": 0, "b": 1}, {"a": 0, "b": 1})
    assert under_way.loads("ab") == {"a": 0, "b": 0}


async def test_a_request_that_is_given_up_before_it_was_sent_does_not_count() -> None:
    under_way = UnderWay()
    pending = asyncio.get_running_loop().create_future()
    under_way.choose(pending, "a")
    pending.cancel()
    await asyncio.sleep(0)

    assert under_way.loads("a") == {"a": 0}


def test_what_could_not_be_sent_leaves_no_debt() -> None:
    under_way = UnderWay()
    under_way.end("a")
    under_way.send("a")

    assert under_way.loads("a") == {"a": 1}
