"""Attention over paged keys and values in a few lines of torch: what every attention kernel must agree with."""

# ruff: noqa: PLR0917  # as the kernels that it specifies

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Gather = Callable[
    [Tensor, Tensor], tuple[Tensor, Tensor]
]  # pages, offsets -> keys, values [context, kv_heads, head_dim]


def paged_attention(
    out: Tensor,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    page_table: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    scale: float,
    window: int,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> None:
    """As `cpu.attention.paged_attention`, whose pages are panels: keys [pages, kv_heads, head_dim, page_size], values
    [pages, kv_heads, page_size, head_dim]."""

    def gather(pages: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
        return keys[pages, :, :, offsets], values[pages, :, offsets]

    _attend(out, q, gather, values.shape[2], page_table, query_starts, context_lens, scale, window, softcap, sinks)


def attention_in_rows(
    out: Tensor,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    page_table: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None = None,
) -> None:
    """As the GPU's: keys and values [pages, page_size, kv_heads, head_dim]; a row of context 0 is padding."""

    def gather(pages: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
        return keys[pages, offsets], values[pages, offsets]

    _attend(out, q, gather, keys.shape[1], page_table, query_starts, context_lens, scale, window, softcap, sinks)


def _attend(
    out: Tensor,
    q: Tensor,
    gather: Gather,
    page_size: int,
    page_table: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None,
) -> None:
    """Token by token: out, q [tokens, heads, head_dim]."""
    for row, length in enumerate(context_lens.tolist()):
        begin, end = query_starts[row : row + 2].tolist()
        for token in range(begin, end if length else begin):
            last = length - (end - 1 - token)
            positions = torch.arange(max(0, last - window) if window else 0, last)
            k, v = gather(page_table[row, positions // page_size].long(), positions % page_size)
            group = q.shape[1] // k.shape[1]
            scores = torch.einsum("hd,thd->ht", q[token], k.repeat_interleave(group, dim=1)) * scale
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            if sinks is not None:  # takes its share of the weights, and gives nothing
                scores = torch.cat([scores, sinks[:, None]], dim=1)
            weights = torch.softmax(scores, dim=1)[:, : len(positions)]
            out[token] = torch.einsum("ht,thd->hd", weights, v.repeat_interleave(group, dim=1))
