"""Paged attention against torch's own: the Numba kernel and its short twin."""

from __future__ import annotations

import pytest
import torch
from support.numeric import assert_close
from torch.nn.functional import scaled_dot_product_attention

from gralora_kernels.cpu import attention as cpu
from gralora_kernels.reference import attention as reference

KERNELS = [
    pytest.param(reference.paged_attention, id="reference"),
    pytest.param(cpu.paged_attention, id="cpu"),
]
NAN = float("nan")


class PagedCase:
    """Contexts scattered over shuffled pages; every slot that belongs to no context holds NaN."""

    def __init__(self, context_lens, heads, kv_heads, head_dim, page_size=16):
        generator = torch.Generator().manual_seed(len(context_lens) + head_dim)
        rows, max_pages = len(context_lens), -(-max(context_lens) // page_size)
        num_pages = rows * max_pages + 3
        self.q = torch.randn(rows, heads, head_dim, generator=generator)
        self.keys = [torch.randn(n, kv_heads, head_dim, generator=generator) for n in context_lens]
        self.values = [torch.randn(n, kv_heads, head_dim, generator=generator) for n in context_lens]
        self.page_table = torch.randperm(num_pages, generator=generator)[: rows * max_pages].view(rows, -1).int()
        self.context_lens = torch.tensor(context_lens, dtype=torch.int32)
        self.k_pages = torch.full((num_pages, kv_heads, head_dim, page_size), NAN)
        self.v_pages = torch.full((num_pages, kv_heads, page_size, head_dim), NAN)
        for row, n in enumerate(context_lens):
            positions = torch.arange(n)
            pages = self.page_table[row, positions // page_size].long()
            self.k_pages[pages, :, :, positions % page_size] = self.keys[row]
            self.v_pages[pages, :, positions % page_size] = self.values[row]

    def run(self, kernel, window, rows=slice(None), softcap=0.0, sinks=None):
        q = self.q[rows].contiguous()
        out = torch.full_like(q, NAN)
        scale = 0.7 * q.shape[-1] ** -0.5
        starts = torch.arange(len(q) + 1, dtype=torch.int32)
        lengths = self.context_lens[rows]
        step = self.page_table[rows], starts, lengths
        kernel(out, q, self.k_pages, self.v_pages, *step, scale, window, softcap, sinks)
        return out

    def expected(self, window):
        scale = 0.7 * self.q.shape[-1] ** -0.5
        rows = [
            scaled_dot_product_attention(
                q[None, :, None], k[-window:].transpose(0, 1)[None], v[-window:].transpose(0, 1)[None], scale=scale,
                enable_gqa=True,
            )[0, :, 0]
            for q, k, v in zip(self.q, self.keys, self.values, strict=True)
        ]  # fmt: skip
        return torch.stack(rows)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("window", [0, 1, 5, 40])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"),
    [(9, 3, 64), (8, 2, 72), (4, 4, 80), (6, 1, 12), (2, 1, 128)],
)
def test_agrees_with_torch(kernel, window, heads, kv_heads, head_dim):
    case = PagedCase([97, 1, 16, 17, 3, 31], heads, kv_heads, head_dim)

    assert_close(case.expected(window), case.run(kernel, window))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("window", [0, 40])
def test_scores_may_be_capped(kernel, window):
    case = PagedCase([97, 1, 16, 31], 4, 2, 72)
    expected = []
    for q, k, v in zip(case.q, case.keys, case.values, strict=True):
        seen_k, seen_v = (one[-window:].repeat_interleave(2, dim=1) for one in (k, v))
        scores = torch.einsum("hd,thd->ht", q, seen_k) * 0.7 * 72**-0.5
        expected.append(torch.einsum("ht,thd->hd", torch.softmax(0.3 * torch.tanh(scores / 0.3), dim=1), seen_v))

    assert_close(torch.stack(expected), case.run(kernel, window, softcap=0.3))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("window", [0, 40])
def test_sinks_take_their_share_of_the_weights(kernel, window):
    """One takes all, one nothing, two are among the scores."""
    case = PagedCase([97, 1, 16, 31], 4, 2, 72)
    sinks, expected = torch.tensor([200.0, -200.0, 0.5, 3.0]), []
    for q, k, v in zip(case.q, case.keys, case.values, strict=True):
        seen_k, seen_v = (one[-window:].repeat_interleave(2, dim=1) for one in (k, v))
        scores = torch.einsum("hd,thd->ht", q, seen_k) * 0.7 * 72**-0.5
        weights = torch.softmax(torch.cat([sinks[:, None], scores], dim=1), dim=1)[:, 1:]
        expected.append(torch.einsum("ht,thd->hd", weights, seen_v))

    assert_close(torch.stack(expected), case.run(kernel, window, sinks=sinks))


def prompt_in_chunks(kernel, case, q, chunks, window):
    """The context of row 0, its queries computed in chunks."""
    out = torch.full_like(q, NAN)
    done = 0
    for count in chunks:
        part = torch.full_like(q[:count], NAN)
        starts = torch.tensor([0, count], dtype=torch.int32)
        length = torch.tensor([done + count], dtype=torch.int32)
        chunk = q[done : done + count].contiguous()
        kernel(part, chunk, case.k_pages, case.v_pages, case.page_table, starts, length, 0.1, window)
        out[done : done + count] = part
        done += count
    return out


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("page_size", [4, 16, 48, 128])
def test_a_prompt_attends_causally(kernel, page_size):
    case = PagedCase([150], 6, 2, 64, page_size)
    q = torch.randn(150, 6, 64)

    out = prompt_in_chunks(kernel, case, q, [150], 0)

    k, v = case.keys[0].transpose(0, 1)[None], case.values[0].transpose(0, 1)[None]
    expected = scaled_dot_product_attention(q.transpose(0, 1)[None], k, v, is_causal=True, scale=0.1, enable_gqa=True)
    assert_close(expected[0].transpose(0, 1), out)


@pytest.mark.parametrize("window", [0, 20, 70])
def test_how_a_prompt_is_cut_changes_no_bit(window):
    case = PagedCase([150], 9, 3, 64)
    q = torch.randn(150, 9, 64)

    whole = prompt_in_chunks(cpu.paged_attention, case, q, [150], window)

    assert torch.equal(whole, prompt_in_chunks(cpu.paged_attention, case, q, [1] * 150, window))
    assert torch.equal(whole, prompt_in_chunks(cpu.paged_attention, case, q, [7, 64, 1, 78], window))


def test_a_rows_result_does_not_depend_on_its_batch():
    case = PagedCase([97, 1, 16, 64, 33], 9, 3, 64)

    together = case.run(cpu.paged_attention, 0)

    for row in range(5):
        assert torch.equal(together[row], case.run(cpu.paged_attention, 0, slice(row, row + 1))[0])


def test_large_scores_do_not_overflow():
    case = PagedCase([40], 3, 1, 64)
    case.q *= 1000

    assert_close(case.expected(0), case.run(cpu.paged_attention, 0))


def test_a_context_beyond_its_page_table_is_refused():
    case = PagedCase([16], 3, 1, 64)
    case.context_lens += 1

    with pytest.raises(ValueError, match="longest context 17"):
        case.run(cpu.paged_attention, 0)
