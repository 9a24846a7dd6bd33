"""Attention over paged keys and values in a few lines of torch: what every attention kernel must agree with."""

from __future__ import annotations

import torch
from torch import Tensor


def paged_attention(  # noqa: PLR0917  # as the kernel that it specifies
    out: Tensor,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    page_table: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    scale: float,
    window: int,
) -> None:
    """As `cpu.attention.paged_attention`, token by token."""
    kv_heads, page_size = values.shape[1:3]
    group = q.shape[1] // kv_heads
    for row, length in enumerate(context_lens.tolist()):
        begin, end = query_starts[row : row + 2].tolist()
        for token in range(begin, end):
            last = length - (end - 1 - token)
            positions = torch.arange(max(0, last - window) if window else 0, last)
            pages, offsets = page_table[row, positions // page_size].long(), positions % page_size
            k = keys[pages, :, :, offsets].repeat_interleave(group, dim=1)  # [context, heads, head_dim]
            v = values[pages, :, offsets].repeat_interleave(group, dim=1)
            weights = torch.softmax(torch.einsum("hd,thd->ht", q[token], k) * scale, dim=1)
            out[token] = torch.einsum("ht,thd->hd", weights, v)
