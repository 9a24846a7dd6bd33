"""Tenants share what there is: nobody starves, nothing is idle, and who gives way loses time and no token."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.fakes import Harness, fake_lease, fake_sequence

from gralora_runtime.scheduling.fairness import MAX_IDLE, Ledger, Prices, bound
from gralora_runtime.scheduling.pages import root_key
from gralora_runtime.scheduling.sequence import Sequence, SequenceStatus
from gralora_runtime.scheduling.waiting import SLACK, FairQueue


def served(harness: Harness, tenant: str) -> float:
    account = harness.scheduler.ledger.tenants().get(tenant)
    return account.served if account is not None else 0.0


def rows_of(harness: Harness) -> Counter[str]:
    return Counter(sequence.tenant for sequence in harness.scheduler.roster.running)


def flood(harness: Harness, tenant: str, count: int, *, prompt: int = 3, max_tokens: int = 50, **kwargs: float) -> None:
    for index in range(count):
        tokens = [index % 250 + 1, *range(2, prompt + 1)]
        harness.scheduler.add(
            fake_sequence(f"{tenant}-{index}", tokens, max_tokens=max_tokens, tenant=tenant, **kwargs)  # type: ignore[arg-type]
        )


def test_a_newcomer_has_a_row_in_its_first_step_though_a_flood_holds_them_all() -> None:
    harness = Harness(max_num_seqs=4, num_pages=256)
    flood(harness, "flood", 100)
    for _ in range(5):
        harness.step()
    harness.scheduler.add(fake_sequence("light", [9, 9], max_tokens=3, tenant="light"))
    plan = harness.step()

    assert plan is not None
    assert "light" in {row.request_id for row in plan.rows}
    assert rows_of(harness) == {"flood": 3, "light": 1}


def test_who_gave_its_row_has_the_same_tokens_as_alone() -> None:
    harness = Harness(max_num_seqs=3, num_pages=64)
    flood(harness, "flood", 6, max_tokens=20)
    for index in range(15):
        harness.step()
        harness.scheduler.add(fake_sequence(f"light-{index}", [index + 1], max_tokens=2, tenant="light"))
    harness.run()

    assert harness.scheduler.counters.preemptions > 0
    assert all(harness.tokens(f"flood-{index}") == [103 + i for i in range(20)] for index in range(6))


@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_rows_and_service_follow_the_weights_of_two_that_always_want_more(weight: float) -> None:
    harness = Harness(max_num_seqs=8, num_pages=1024, max_num_batched_tokens=64)
    flood(harness, "many", 400, prompt=30, max_tokens=10)
    flood(harness, "heavy", 200, prompt=3, max_tokens=10, weight=weight)
    limit = bound(harness.scheduler.ledger.prices, longest_prompt=30, most_tokens=8 * 40)
    differences = []
    while {sequence.tenant for sequence in harness.scheduler.roster.waiting} == {"many", "heavy"}:
        harness.step()
        differences.append(abs(served(harness, "many") - served(harness, "heavy")))

    assert len(differences) > 100
    assert max(differences) <= limit
    # Far closer than the theorem says: a step's prompts, and the rows' outputs until one of them ends.
    assert max(differences) <= 64 + 2 * 8 * 10
    assert differences[-1] < 0.05 * served(harness, "many")


def test_nobody_takes_turns_at_equal_shares() -> None:
    harness = Harness(max_num_seqs=4, num_pages=1024)
    flood(harness, "a", 50)
    flood(harness, "b", 50)
    for _ in range(200):
        harness.step()

    assert harness.scheduler.counters.preemptions <= 4


def test_one_row_each_is_taken_from_nobody() -> None:
    harness = Harness(max_num_seqs=4, num_pages=256)
    for name in "abcdef":
        flood(harness, name, 1)
    for _ in range(10):
        harness.step()

    assert harness.scheduler.counters.preemptions == 0
    assert harness.scheduler.num_waiting == 2


def test_a_tenant_that_is_alone_has_all_rows() -> None:
    harness = Harness(max_num_seqs=4, num_pages=256)
    flood(harness, "gone", 2, max_tokens=2)
    harness.run()
    flood(harness, "alone", 9)
    for _ in range(4):
        harness.step()

    assert rows_of(harness) == {"alone": 4}


def test_who_was_away_saves_nothing_up() -> None:
    harness = Harness(max_num_seqs=2, num_pages=256)
    flood(harness, "busy", 30, max_tokens=10)
    for _ in range(60):
        harness.step()
    before = served(harness, "busy")
    flood(harness, "late", 30, max_tokens=10)
    for _ in range(60):
        harness.step()
    late, busy = served(harness, "late") - before, served(harness, "busy") - before

    assert before > 0
    assert late == pytest.approx(busy, rel=0.25)


def test_a_flood_of_long_prompts_leaves_those_that_decode_their_tokens_and_most_of_a_step() -> None:
    harness = Harness(max_num_seqs=8, num_pages=1024, max_num_batched_tokens=64)
    harness.scheduler.add(fake_sequence("stream", [1], max_tokens=200, tenant="light"))
    harness.step()
    flood(harness, "flood", 20, prompt=120, max_tokens=1)
    harness.step()  # both start level
    plans = [harness.step() for _ in range(20)]

    for plan in plans:
        assert plan is not None
        assert "stream" in {row.request_id for row in plan.rows}
        assert plan.num_tokens - plan.num_decode_rows <= 16
    assert sum(plan.num_tokens for plan in plans if plan is not None) >= 20 * 15


def test_the_step_of_a_newcomers_prompt_has_no_prompt_of_a_crowd() -> None:
    harness = Harness(max_num_seqs=8, num_pages=1024, max_num_batched_tokens=64)
    flood(harness, "flood", 40, prompt=120, max_tokens=50)
    for _ in range(5):
        harness.step()
    harness.scheduler.add(fake_sequence("light", [1, 2, 3], max_tokens=1, tenant="light"))
    plan = harness.step()
    after = harness.step()

    assert plan.num_decode_rows > 1
    assert [row.request_id for row in plan.rows if len(row.token_ids) > 1] == ["light"]
    assert after.num_tokens == 64


def test_tenants_of_equal_crowds_share_steps() -> None:
    harness = Harness(max_num_seqs=8, num_pages=1024, max_num_batched_tokens=64)
    for name in "abcd":
        flood(harness, name, 10, prompt=10, max_tokens=5)
    plan = harness.step()

    assert plan.num_tokens == 64
    assert len({row.request_id.partition("-")[0] for row in plan.rows}) == 4


def test_long_prompts_of_one_tenant_do_not_hold_up_another_ones_short_one() -> None:
    harness = Harness(max_num_seqs=8, num_pages=1024, max_num_batched_tokens=16)
    flood(harness, "flood", 7, prompt=120, max_tokens=1)
    harness.step()
    harness.scheduler.add(fake_sequence("short", [1, 2, 3], max_tokens=1, tenant="light"))
    harness.step()
    harness.step()

    assert harness.tokens("short") == [103]


def test_priorities_order_a_tenants_own_requests_and_nobody_elses() -> None:
    harness = Harness(max_num_seqs=1, num_pages=64)
    for name, tenant, priority in (("low", "a", 0), ("high", "a", 5), ("other", "b", 0)):
        harness.scheduler.add(fake_sequence(name, [1], max_tokens=2, tenant=tenant, priority=priority))
    order = []
    while harness.scheduler.has_work:
        plan = harness.step()
        order += [row.request_id for row in plan.rows if row.request_id not in order]

    assert order == ["high", "other", "low"]


def test_pages_are_given_up_for_a_tenant_that_holds_fewer() -> None:
    harness = Harness(max_num_seqs=8, num_pages=16, page_size=4)
    flood(harness, "flood", 4, prompt=4, max_tokens=12)
    for _ in range(8):
        harness.step()
    harness.scheduler.add(fake_sequence("light", list(range(8)), max_tokens=2, tenant="light"))
    plan = harness.step()
    harness.run()

    assert "light" in {row.request_id for row in plan.rows}
    assert harness.tokens("light") == [108, 109]


def test_a_loaded_adapter_is_paid_for() -> None:
    harness = Harness()
    harness.scheduler.ledger.prices = Prices(adapter_byte=0.5)
    sequence = fake_sequence("a", [1], tenant="a")
    sequence.loaded_bytes = 100
    harness.scheduler.add(sequence)

    assert served(harness, "a") == 50.0


def test_a_token_is_paid_for_once_however_often_it_is_computed() -> None:
    harness = Harness(num_pages=4, page_size=4)
    for name in ("a", "b"):
        harness.scheduler.add(fake_sequence(name, [ord(name), *range(5)], max_tokens=8, tenant="one"))
    harness.scheduler.add(fake_sequence("watch", [1], max_tokens=200, tenant="one"))  # keeps the account open
    while {"a", "b"} & set(harness.scheduler.roster.ids()):
        harness.step()

    assert harness.scheduler.counters.preemptions > 0
    watch = harness.scheduler.sequence("watch")
    of_watch = min(1, watch.num_paid) + 2.0 * max(0, watch.num_paid - 1)
    assert served(harness, "one") - of_watch == 2 * (6 * 1.0 + 7 * 2.0)  # the last token is never an input


def test_a_paused_sequence_gives_up_its_row_and_goes_on_where_it_was() -> None:
    harness = Harness(max_num_seqs=1, num_pages=64)
    harness.scheduler.add(fake_sequence("slow", [1, 2], max_tokens=6))
    harness.step()
    harness.step()
    harness.scheduler.add(fake_sequence("next", [3], max_tokens=3))
    harness.scheduler.pause("slow")
    harness.scheduler.pause("slow")
    harness.run()

    assert harness.tokens("next") == [101, 102, 103]
    assert harness.scheduler.num_paused == 1
    assert len(harness.tokens("slow")) == 2

    harness.scheduler.resume("slow")
    harness.scheduler.resume("slow")
    harness.run()

    assert harness.tokens("slow") == [102, 103, 104, 105, 106, 107]
    assert harness.pool.counts().leased == 0
    assert len(harness.released) == 2


def test_who_is_paused_can_be_cancelled_and_nothing_is_left() -> None:
    harness = Harness()
    harness.scheduler.add(fake_sequence("slow", [1, 2], max_tokens=6))
    harness.step()
    harness.scheduler.pause("slow")
    harness.scheduler.cancel("slow")
    harness.step()

    assert harness.finish_reason("slow") == "cancelled"
    assert harness.scheduler.num_paused == 0
    assert len(harness.released) == 1


def test_prefixes_are_not_shared_between_scopes() -> None:
    harness = Harness(max_num_batched_tokens=64)
    scopes = {"a": "acme", "b": "other", "c": "acme", "d": ""}
    cached = {}
    for name, scope in scopes.items():
        lease = fake_lease("digest", 0)
        harness.scheduler.add(fake_sequence(name, list(range(10)), max_tokens=1, lease=lease, prefix_scope=scope))
        harness.run()
        cached[name] = harness.outputs[name][0].delta.started.cached_tokens

    assert cached == {"a": 0, "b": 0, "c": 8, "d": 0}
    assert len({root_key("digest", scope) for scope in ("", "acme", "other")}) == 3


@pytest.mark.parametrize("seed", range(6))
def test_a_random_crowd_of_tenants_is_served_whole(seed: int) -> None:
    """Little room, so that rows and pages change hands all the time: everybody ends, with the tokens of alone."""
    rng = random.Random(seed)
    harness = Harness(num_pages=14, max_num_seqs=4, max_num_batched_tokens=9)
    cancelled: set[str] = set()
    for index in range(150):
        prompt = [rng.randrange(2) for _ in range(rng.randrange(1, 20))]
        tenant = rng.choice(["flood"] * 8 + ["light", "third"])
        harness.scheduler.add(
            fake_sequence(
                str(index),
                prompt,
                max_tokens=rng.randrange(1, 12),
                lease=fake_lease(rng.choice(["x", "y"]), 0),
                tenant=tenant,
                weight=2.0 if tenant == "third" else 1.0,
                priority=rng.randrange(3),
            )
        )
        for act, chance in (
            (harness.scheduler.cancel, 0.2),
            (harness.scheduler.pause, 0.3),
            (harness.scheduler.resume, 0.3),
        ):
            if rng.random() < chance:
                chosen = str(rng.randrange(index + 1))
                act(chosen)
                if act == harness.scheduler.cancel:
                    cancelled.add(chosen)
        harness.step()
    for index in range(150):
        harness.scheduler.resume(str(index))
    harness.run(5000)

    assert harness.scheduler.counters.preemptions > 0
    assert harness.pool.counts().leased == 0
    assert len(harness.released) == 150
    assert not harness.scheduler.ledger.tenants()
    for name in set(harness.outputs) - cancelled:
        tokens = harness.tokens(name)
        prompt_len = harness.outputs[name][-1].delta.finished.prompt_tokens
        assert tokens == [100 + prompt_len + i for i in range(len(tokens))]


def waiting_sequence(number: int, tenant: str, priority: int) -> Sequence:
    sequence = fake_sequence(str(number), [1], tenant=tenant, priority=priority)
    sequence.number, sequence.status = number, SequenceStatus.WAITING
    return sequence


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("add"), st.sampled_from("abc"), st.integers(0, 2)),
            st.tuples(st.just("take"), st.just(""), st.just(0)),
            st.tuples(st.just("charge"), st.sampled_from("abc"), st.integers(1, 9)),
            st.tuples(st.just("remove"), st.just(""), st.integers(0, 9)),
        ),
        max_size=60,
    )
)
@settings(deadline=None)
def test_the_queue_says_what_a_look_at_all_that_wait_says(actions: list[tuple[str, str, int]]) -> None:
    ledger = Ledger(Prices())
    queue, waiting = FairQueue(ledger), []
    for tenant in "abc":
        ledger.enter(tenant, 1.0)
    for number, (action, tenant, value) in enumerate(actions):
        if action == "add":
            sequence = waiting_sequence(number, tenant, value)
            least = min((ledger.account(other.tenant).served for other in waiting), default=None)
            queue.add(sequence)
            if least is not None:
                assert ledger.account(tenant).served >= least
            waiting.append(sequence)
        elif action == "charge":
            ledger.charge(tenant, float(value))
        elif waiting:
            sequence = queue.first() if action == "take" else waiting[value % len(waiting)]
            queue.remove(sequence)
            waiting.remove(sequence)
        expected = min(waiting, key=lambda s: (ledger.account(s.tenant).served, -s.priority, s.number), default=None)
        assert queue.first() is expected
        assert len(queue) == len(waiting)
        assert set(queue) == set(waiting)


def test_the_queue_does_not_grow_by_those_that_come_and_go() -> None:
    ledger = Ledger(Prices())
    queue = FairQueue(ledger)
    for number in range(10_000):
        tenant = str(number % 7)
        ledger.enter(tenant, 1.0)
        sequence = waiting_sequence(number, tenant, 0)
        queue.add(sequence)
        queue.remove(sequence)
        ledger.leave(tenant)

    assert len(queue._heap) <= SLACK
    assert queue.first() is None


def test_tenants_that_left_are_forgotten_one_day() -> None:
    ledger = Ledger(Prices())
    for number in range(MAX_IDLE + 10):
        ledger.enter(str(number), 1.0)
        ledger.charge(str(number), 5.0)
        ledger.leave(str(number))

    assert ledger.enter(str(MAX_IDLE + 9), 1.0).served == 5.0
    assert ledger.enter("0", 1.0).served == 0.0
    assert len(ledger._idle) == MAX_IDLE - 1
