"""A plan as tensors: every token at its place, and never an adapter slot that was reused meanwhile."""

from __future__ import annotations

import pytest

from gralora_runtime.plan import NEVER, AdapterUse, RowPlan, StepPlan
from gralora_runtime.stepping.batch import BatchBuilder, StaleAdapterError

BASE = AdapterUse(slot=-1, generation=0, width=0)
GENERATIONS = {0: 3, 5: 1}


@pytest.fixture
def builder() -> BatchBuilder:
    return BatchBuilder(max_num_tokens=16, page_size=4, slot_generation=GENERATIONS.__getitem__)


def row(name: str, tokens: tuple[int, ...], start: int, pages: tuple[int, ...], adapter: AdapterUse) -> RowPlan:
    seat = ["decode", "base", "unfinished", "prompt", "a", "b"].index(name)
    return RowPlan(name, tokens, start, pages, adapter, samples=name != "unfinished", seat=seat)


def test_a_slot_that_was_given_to_another_adapter_stops_the_step(builder: BatchBuilder) -> None:
    """The lease said generation 2; somebody else's weights are in the slot since."""
    stale = AdapterUse(slot=0, generation=2, width=8)

    with pytest.raises(StaleAdapterError, match="adapter slot 0 does not hold generation 2"):
        builder.build(StepPlan((row("a", (7,), 0, (0,), stale),), 1))


def test_every_token_goes_to_its_row_position_page_and_adapter(builder: BatchBuilder) -> None:
    rows = (
        row("decode", (7,), 5, (9, 2), AdapterUse(slot=5, generation=1, width=16)),
        row("base", (8,), 0, (4,), BASE),
        row("unfinished", (10, 11, 12), 3, (1, 6), AdapterUse(slot=0, generation=3, width=24)),
        row("prompt", (20, 21), 0, (3,), AdapterUse(slot=5, generation=1, width=16)),
    )

    tensors = builder.build(StepPlan(rows, 2))

    assert tensors.input_ids.tolist() == [[7, 8, 10, 11, 12, 20, 21]]
    assert tensors.position_ids.tolist() == [[5, 0, 3, 4, 5, 0, 1]]
    assert tensors.kv_slots.tolist() == [2 * 4 + 1, 4 * 4, 1 * 4 + 3, 6 * 4, 6 * 4 + 1, 3 * 4, 3 * 4 + 1]
    assert tensors.page_table.tolist() == [[9, 2], [4, 0], [1, 6], [3, 0]]
    assert tensors.context_lens.tolist() == [6, 1, 6, 2]
    assert tensors.query_starts.tolist() == [0, 1, 2, 5, 7]
    assert tensors.logits_index.tolist() == [0, 1, 6]
    assert tensors.grouping.slots.tolist() == [0, 5]
    assert tensors.grouping.order.tolist() == [2, 3, 4, 0, 5, 6]
    assert tensors.grouping.max_width == 24


def test_tokens_before_an_invocation_are_the_base_models_and_the_slot_is_checked_all_the_same(
    builder: BatchBuilder,
) -> None:
    adapter, stale = AdapterUse(slot=0, generation=3, width=24), AdapterUse(slot=0, generation=2, width=24)
    decoding = row("decode", (7,), 5, (9, 2), AdapterUse(slot=5, generation=1, width=16))
    before = row("unfinished", (10, 11), 3, (1, 6), adapter)._replace(adapted_from=5)
    prompt = row("prompt", (20, 21, 22), 1, (3,), adapter)._replace(adapted_from=2)
    after = row("a", (8,), 9, (4, 5, 7), adapter)._replace(adapted_from=9)
    never = row("b", (8, 8), 0, (8,), adapter)._replace(adapted_from=NEVER)

    grouping = builder.build(StepPlan((decoding, after, before, prompt, never), 2)).grouping
    assert grouping.slots.tolist() == [0, 5]
    assert grouping.order.tolist() == [1, 5, 6, 0]
    assert grouping.num_tokens == 9

    grouping = builder.build(StepPlan((before, never), 0)).grouping
    assert (grouping.num_adapted, grouping.max_width) == (0, 0)

    with pytest.raises(StaleAdapterError):
        builder.build(StepPlan((never._replace(adapter=stale),), 0))


def test_a_step_of_base_rows_alone_has_no_adapted_token_after_one_that_had(builder: BatchBuilder) -> None:
    builder.build(StepPlan((row("a", (7,), 0, (0,), AdapterUse(slot=0, generation=3, width=8)),), 1))

    assert builder.build(StepPlan((row("b", (7,), 0, (0,), BASE),), 1)).grouping.num_adapted == 0
