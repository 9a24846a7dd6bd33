"""The GPU's paged attention against its twin: any page, head, window and cut, and nothing read that is no row's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.numeric import BOUNDS

from gralora_kernels.attention_work import SPLIT
from gralora_kernels.reference.attention import attention_in_rows
from gralora_kernels.replay import ReplayError
from gralora_kernels.triton_ops.attention_launch import AttentionShape, PagedAttention

CPU = torch.device("cpu")
NAN = float("nan")
LONG = SPLIT * 2 + 9


class Case:
    """Contexts scattered over shuffled pages. Slots that belong to nobody hold NaN, entries of no page are garbage."""

    def __init__(self, contexts, *, heads=4, kv_heads=2, head_dim=32, page_size=16):
        self.shape = AttentionShape(
            heads=heads, kv_heads=kv_heads, head_dim=head_dim, page_size=page_size, q_row=heads + 2 * kv_heads
        )
        self.contexts = contexts
        generator = torch.Generator().manual_seed(sum(contexts) + head_dim)
        width = -(-max(contexts) // page_size) + 1
        num_pages = sum(-(-length // page_size) for length in contexts) + 3
        free = torch.randperm(num_pages, generator=generator).tolist()
        self.page_table = torch.full((len(contexts), width), 2**30, dtype=torch.int32)
        self.keys, self.values = (torch.full((num_pages, page_size, kv_heads, head_dim), NAN) for _ in range(2))
        for row, length in enumerate(contexts):
            for start in range(0, length, page_size):
                page, used = free.pop(), min(page_size, length - start)
                self.page_table[row, start // page_size] = page
                for pool in (self.keys, self.values):
                    pool[page, :used] = torch.randn(used, kv_heads, head_dim, generator=generator)
        self.q = [torch.randn(length, self.shape.q_row * head_dim, generator=generator) for length in contexts]

    def run(self, steps, *, window=0, softcap=0.0, sinks=None, attention=None, twin=False):
        """`steps`: (row, number of queries, context) each; returns [tokens, heads, head_dim] of each row."""
        attention = attention or PagedAttention(self.shape, torch.float32, CPU, invariant=False)
        starts = np.cumsum([0, *(count for _, count, _ in steps)]).astype(np.int32)
        lengths = np.array([length for _, _, length in steps], np.int32)
        q = torch.cat(
            [self.q[row][length - count : length] if length else self.q[row][:count] for row, count, length in steps]
        )
        rows = [row for row, _, _ in steps]
        step = {
            "page_table": self.page_table[rows],
            "query_starts": torch.from_numpy(starts),
            "context_lens": torch.from_numpy(lengths),
        }
        scale = 0.7 * self.shape.head_dim**-0.5
        out = torch.full((len(q), self.shape.heads * self.shape.head_dim), NAN)
        by_head = out.view(len(q), self.shape.heads, self.shape.head_dim)
        if twin:
            heads = q.view(len(q), -1, self.shape.head_dim)[:, : self.shape.heads]
            attention_in_rows(by_head, heads, self.keys, self.values, *step.values(), scale, window, softcap, sinks)
        else:
            attention.prepare(starts, lengths)
            options = {"scale": scale, "window": window, "softcap": softcap, "sinks": sinks}
            attention.attend(out, q, self.keys, self.values, **options, **step)
        return by_head.split([count for _, count, _ in steps])

    def error(self, steps, **options):
        actual, expected = (torch.cat(self.run(steps, twin=twin, **options)) for twin in (False, True))
        return float((actual - expected).norm() / expected.norm())


def assert_right(case, steps, **options):
    assert case.error(steps, **options) <= BOUNDS[torch.float32]


@pytest.mark.parametrize("page_size", [1, 7, 16, 32])
@pytest.mark.parametrize("window", [0, 5, 300])
def test_pages_windows_decoding_rows_and_chunks(page_size, window):
    case = Case([70, LONG, 33, 1], page_size=page_size)

    assert_right(case, [(0, 1, 70), (1, 1, LONG), (3, 1, 1), (2, 20, 33), (0, 3, 40)], window=window)


@pytest.mark.parametrize("head_dim", [32, 64, 72, 80, 96, 128, 256])
def test_heads_of_any_width(head_dim):
    assert_right(Case([35, 20], head_dim=head_dim), [(0, 1, 35), (1, 6, 20)])


@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (8, 2), (6, 2), (7, 1), (12, 1), (32, 1), (70, 2)])
def test_groups_of_any_size(heads, kv_heads):
    assert_right(Case([35, 20], heads=heads, kv_heads=kv_heads), [(0, 1, 35), (1, 1, 20), (0, 9, 30)])


@pytest.mark.parametrize("window", [0, 1, SPLIT, SPLIT + 20])
def test_a_soft_cap(window):
    assert_right(Case([LONG, 20]), [(0, 1, LONG), (1, 4, 20)], window=window, softcap=0.8)


@pytest.mark.parametrize("window", [0, SPLIT + 20])
def test_sinks(window):
    """Of a context in parts, too; one that takes all, one that takes nothing, and two among the scores."""
    sinks = torch.tensor([90.0, -90.0, 0.5, 3.0])

    assert_right(Case([LONG, 20]), [(0, 1, LONG), (1, 4, 20)], window=window, sinks=sinks)


def test_contexts_around_the_ends_of_stretches():
    lengths = [SPLIT - 1, SPLIT, SPLIT + 1, 2 * SPLIT]
    case = Case(lengths)

    assert_right(case, [(row, 1, length) for row, length in enumerate(lengths)])


def test_padding_rows_read_and_write_nothing():
    case = Case([20, 33, 1])

    first, padding, last = case.run([(0, 1, 20), (2, 1, 0), (1, 1, 33)])

    assert padding.isnan().all()
    assert torch.equal(first, case.run([(0, 1, 20)])[0])
    assert torch.equal(last, case.run([(1, 1, 33)])[0])


@pytest.fixture
def short_stretches(monkeypatch, row_by_row_products):
    """Stretches of two tiles, so that a few make a long context."""
    monkeypatch.setattr("gralora_kernels.attention_work.SPLIT", 64)
    monkeypatch.setattr("gralora_kernels.triton_ops.attention_launch.SPLIT", 64)


@pytest.mark.usefixtures("short_stretches")
@pytest.mark.parametrize(("window", "heads"), [(0, (4, 2)), (40, (4, 2)), (0, (20, 1))])
def test_a_rows_bits_depend_neither_on_its_neighbours_nor_on_how_its_prompt_was_cut(window, heads):
    case = Case([150, 50], heads=heads[0], kv_heads=heads[1])
    attention = PagedAttention(case.shape, torch.float32, CPU, invariant=True)

    def run(steps):
        return case.run(steps, window=window, attention=attention)

    (whole,) = run([(0, 150, 150)])
    chunk, _, other = run([(0, 37, 150), (1, 1, 50), (0, 30, 82)])
    lengths = (1, 32, 33, 64, 65, 128, 150)
    alone = [run([(0, 1, length)])[0] for length in lengths]
    together = run([(0, 1, length) for length in lengths])

    assert torch.equal(chunk, whole[-37:])
    assert torch.equal(other, whole[52:82])
    for length, row, beside in zip(lengths, alone, together, strict=True):
        assert torch.equal(row[0], whole[length - 1])
        assert torch.equal(row, beside)


@pytest.mark.usefixtures("short_stretches")
def test_a_context_that_is_cut_has_the_bits_of_one_that_is_not(monkeypatch):
    case = Case([150, 300, 64])
    steps, results = [(0, 1, 150), (1, 1, 300), (2, 1, 64)], []

    for enough in (0, 1 << 20):
        monkeypatch.setattr("gralora_kernels.triton_ops.attention_launch.ENOUGH_PER_PROCESSOR", enough)
        attention = PagedAttention(case.shape, torch.float32, CPU, invariant=False)
        results.append(case.run(steps, attention=attention))
        assert (len(attention._work.merges) > 0) == (enough > 0)

    assert all(map(torch.equal, *results))


def test_a_frozen_instance_has_nothing_to_do_before_its_first_step():
    """Graphs are captured then, and what they launch must not read what memory holds by chance."""
    frozen = PagedAttention(Case([20]).shape, torch.float32, CPU, invariant=False).frozen(2, LONG)

    assert not frozen._words.any()


def test_very_long_contexts_have_several_stretches_in_each_part(monkeypatch):
    monkeypatch.setattr("gralora_kernels.attention_work.MAX_ITEMS", 2)
    case = Case([5 * SPLIT - 3])

    assert_right(case, [(0, 1, 5 * SPLIT - 3)])
    assert_right(case, [(0, 1, 5 * SPLIT - 3)], window=SPLIT + 7)
    assert_right(case, [(0, 1, 5 * SPLIT - 3)], window=4 * SPLIT)


def test_a_frozen_instance_has_the_bits_of_any_other():
    """As a CUDA graph replays it: launches and memory of the largest step, whatever the step."""
    case = Case([LONG, 20, 300, 7])
    frozen = PagedAttention(case.shape, torch.float32, CPU, invariant=False).frozen(4, LONG)
    memory = [tensor.data_ptr() for tensor in (frozen._words, frozen._sums, frozen._stats)]

    for steps in ([(0, 1, LONG), (2, 1, 300)], [(1, 1, 20)], [(0, 1, 400), (1, 1, 3), (2, 1, 0), (3, 1, 7)]):
        for actual, expected in zip(case.run(steps, attention=frozen), case.run(steps), strict=True):
            assert torch.equal(actual, expected) or expected.isnan().all()
    assert memory == [tensor.data_ptr() for tensor in (frozen._words, frozen._sums, frozen._stats)]


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([(0, 1, 5)] * 3, "needs rows 3, but the graph was captured with 2"),
        ([(0, 4, 5)], "needs tokens of a row 4, but the graph was captured with 1"),
    ],
)
def test_a_frozen_instance_refuses_what_its_graph_does_not_compute(steps, message):
    case = Case([20])

    with pytest.raises(ReplayError, match=message):
        case.run(steps, attention=PagedAttention(case.shape, torch.float32, CPU, invariant=False).frozen(2, 20))
