"""Who has counts of its own: never too many, rarely others, and every request is counted once."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from gralora_runtime.observation.usage import BASE, LEAD, MEMORY, OTHER, AdapterAccounts


def requests(accounts: AdapterAccounts) -> dict[str, int]:
    return {name: tally.requests for name, tally in accounts.read().items()}


def test_adapters_are_named_while_there_is_room_and_the_base_model_takes_none() -> None:
    accounts = AdapterAccounts(2)
    for name in ("", "a", "a", "b", "c", ""):
        accounts.use(name)

    assert requests(accounts) == {BASE: 2, OTHER: 1, "a": 2, "b": 1}


def test_a_clearly_busier_adapter_takes_the_name_of_the_least_used() -> None:
    accounts = AdapterAccounts(2)
    for name in ("a", "a", "a", "b"):
        accounts.use(name)
    for _ in range(2 + LEAD - 1):
        accounts.use("c")
    assert set(requests(accounts)) == {BASE, OTHER, "a", "b"}
    accounts.use("c")

    # What c did before it had the name stays with the others, and what b did is not added to them.
    assert requests(accounts) == {BASE: 0, OTHER: LEAD + 1, "a": 3, "c": 1}


def test_an_adapter_that_gets_its_name_back_goes_on_from_its_old_counts() -> None:
    accounts = AdapterAccounts(1)
    for _ in range(5):
        accounts.use("a")
    for _ in range(2 * 5 + LEAD):
        accounts.use("b")
    assert "a" not in requests(accounts)
    while "a" not in requests(accounts):
        accounts.use("a")

    assert requests(accounts)["a"] == 5 + 1


def test_a_request_that_runs_while_its_adapter_loses_the_name_goes_on_counting_among_the_others() -> None:
    accounts = AdapterAccounts(1)
    running = accounts.use("a")
    running.tally.generated_tokens += 3
    for _ in range(2 + LEAD):
        accounts.use("b")
    running.tally.generated_tokens += 4

    assert accounts.read()[OTHER].generated_tokens == 4


def test_an_adapter_that_is_really_called_other_is_never_named() -> None:
    accounts = AdapterAccounts(5)
    accounts.use("other")

    assert requests(accounts) == {BASE: 0, OTHER: 1}


def test_without_names_all_adapters_are_others() -> None:
    accounts = AdapterAccounts(0)
    for name in ("a", "b", ""):
        accounts.use(name)

    assert requests(accounts) == {BASE: 1, OTHER: 2}


def crowd(seed: int, count: int) -> list[str]:
    """Requests for 10,000 adapters, of which the first ten get half of them."""
    rng = random.Random(seed)
    return [f"a{rng.randrange(10) if rng.random() < 0.5 else rng.randrange(10_000)}" for _ in range(count)]


def test_among_ten_thousand_adapters_the_busy_ones_have_the_names_and_memory_is_bounded() -> None:
    accounts, limit = AdapterAccounts(20), 20
    for index in range(10_000):  # everybody once, so that nobody busy comes first
        accounts.use(f"a{9_999 - index}")
    for name in crowd(0, 20_000):
        accounts.use(name)

    assert {f"a{index}" for index in range(10)} <= set(requests(accounts))
    assert len(requests(accounts)) == limit + 2
    assert len(accounts._named) + len(accounts._unnamed) <= limit * (1 + MEMORY) + 1


@pytest.mark.parametrize(
    "names", [crowd(1, 20_000), [f"a{i % 10_000}" for i in range(20_000)]], ids=["busy", "uniform"]
)
def test_counts_only_grow_each_request_counts_once_and_names_are_not_swapped_to_and_fro(names: list[str]) -> None:
    accounts = AdapterAccounts(20)
    seen: Counter[str] = Counter()
    swaps, named = 0, set()
    for index, name in enumerate(names):
        accounts.use(name)
        now = requests(accounts)
        grown = sum(now[each] - seen[each] for each in now)
        assert grown == 1, f"request {index}"
        assert all(now[each] >= seen[each] for each in now)
        swaps += len(named - now.keys())
        named = set(now)
        seen |= Counter(now)  # the largest that was ever seen of each

    assert swaps <= 20
