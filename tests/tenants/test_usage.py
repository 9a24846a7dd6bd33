"""What was used: counts that only grow, in a bounded number of rows."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gralora_server.tenants.usage import OTHERS, Counts, Usage, UsageRow

FIRST = ("", "")


def everything(usage: Usage, tenant: str | None = None) -> list[UsageRow]:
    return usage.rows(tenant=tenant, first=FIRST, limit=10_000)


def counts_of(usage: Usage, tenant: str, adapter: str) -> Counts:
    (found,) = [row.counts for row in everything(usage, tenant) if row.adapter == adapter]
    return found


def test_each_tenant_and_adapter_has_its_row() -> None:
    usage = Usage()
    usage.add("acme", "poet", Counts(requests=1))
    usage.add("acme", "poet", Counts(prompt_tokens=5, cached_tokens=2))
    usage.add("acme", "poet", Counts(output_tokens=7))
    usage.add("acme", "", Counts(requests=1))
    usage.add("", "poet", Counts(requests=1, upload_bytes=9))
    usage.refuse("acme", "poet")

    assert everything(usage) == [
        UsageRow("", "poet", Counts(requests=1, upload_bytes=9)),
        UsageRow("acme", "", Counts(requests=1)),
        UsageRow("acme", "poet", Counts(1, 5, 2, 7, refused=1)),
    ]
    assert everything(usage, "acme") == everything(usage)[1:]
    assert everything(usage, "nobody") == []


def test_nobody_gets_rows_by_asking_for_names() -> None:
    usage = Usage()
    for index in range(100):
        usage.refuse("acme", f"made-up-{index}")

    assert everything(usage) == [UsageRow("acme", OTHERS, Counts(refused=100))]


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 20), st.booleans()), max_size=200))
def test_rows_are_bounded_and_nothing_is_lost_or_counted_twice(uses: list[tuple[str, int, bool]]) -> None:
    usage, before = Usage(max_adapters=4), {}
    for tenant, adapter, is_refused in uses:
        if is_refused:
            usage.refuse(tenant, str(adapter))
        else:
            usage.add(tenant, str(adapter), Counts(requests=1))
        now = {(row.tenant, row.adapter): (row.counts.requests, row.counts.refused) for row in everything(usage)}
        assert all(now[key] >= counts for key, counts in before.items())
        before = now

    for tenant in "ab":
        rows = everything(usage, tenant)
        assert len(rows) <= 4 + 1
        assert sum(row.counts.requests for row in rows) == sum(t == tenant and not r for t, _, r in uses)
        assert sum(row.counts.refused for row in rows) == sum(t == tenant and r for t, _, r in uses)


@given(st.integers(1, 7))
def test_pages_are_all_of_it_once(size: int) -> None:
    usage = Usage()
    for tenant in ("", "a", "a.b", "ab", "b"):
        for adapter in ("", "x", "x/y", "x/y@main", OTHERS):
            usage.add(tenant, adapter, Counts(requests=1))
    found: list[UsageRow] = []
    first: tuple[str, str] | None = FIRST
    while first is not None:
        *page, after = [*usage.rows(tenant=None, first=first, limit=size + 1), None]
        if len(page) > size:
            after = page.pop()
        found += page
        first = None if after is None else (after.tenant, after.adapter)

    assert found == everything(usage)
    assert len(found) == 25


def test_what_changed_is_taken_once_and_can_be_put_back() -> None:
    usage = Usage()
    usage.restore([UsageRow("acme", "poet", Counts(requests=5)), UsageRow("acme", "bard", Counts(requests=6))])
    assert usage.take_changed() == []
    usage.add("acme", "poet", Counts(requests=1))
    taken = usage.take_changed()

    assert taken == [UsageRow("acme", "poet", Counts(requests=6))]
    assert usage.take_changed() == []
    usage.put_back(taken)
    usage.add("acme", "poet", Counts(requests=1))
    assert usage.take_changed() == [UsageRow("acme", "poet", Counts(requests=7))]


def test_since_the_start_only_so_many_tenants_are_told_apart_and_each_count_only_grows() -> None:
    usage = Usage(max_named_tenants=2)
    usage.restore([UsageRow("old", "poet", Counts(requests=100))])
    for tenant in ("a", "b", "c", "old", "a"):
        usage.add(tenant, "poet", Counts(requests=1))

    named, others = usage.since_start()
    assert named == {"a": Counts(requests=2), "b": Counts(requests=1)}
    assert others == Counts(requests=2)
    assert counts_of(usage, "old", "poet").requests == 101


def test_what_was_told_does_not_change_afterwards() -> None:
    usage = Usage()
    usage.add("acme", "poet", Counts(requests=1))
    named, _ = usage.since_start()
    (row,) = everything(usage)
    usage.add("acme", "poet", Counts(requests=1))

    assert (row.counts.requests, named["acme"].requests) == (1, 1)
