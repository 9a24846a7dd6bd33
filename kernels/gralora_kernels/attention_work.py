"""A step's attention cut into items for the GPU. Plain numpy; knows no kernel and no layer.

The context of a row is cut into stretches of `SPLIT` positions. A row that decodes has several items if its context is
long, each for some of its stretches; their results are merged in order by a second kernel. Queries of a prompt share
tiles, and each tile does all stretches that it sees. How a row is cut follows from the row alone, so that its result
does not depend on its neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

ATTENTION_ITEM = 8
SPLIT = 256  # positions
MAX_ITEMS = 64  # of a row that decodes: contexts of more than 16,384 have several stretches in each

Int32s = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionWork:
    """What one step's two launches do, in every layer."""

    # row, first query token of the step, number of them, first stretch, last stretch + 1, number of the partial result
    # or -1 if it is the whole result
    items: Int32s  # [items, ATTENTION_ITEM]
    # token, first partial result, number of them, row, stretches in each
    merges: Int32s  # [tokens whose result is in parts, ATTENTION_ITEM]
    num_partials: int


def max_partials(rows: int, max_model_len: int) -> int:
    """The most partial results of a step."""
    return rows * min(MAX_ITEMS, -(-max_model_len // SPLIT))


def plan_attention(query_starts: Int32s, context_lens: Int32s, tile_tokens: int) -> AttentionWork:
    """`query_starts` [rows + 1], `context_lens` [rows]; a row of context 0 is padding and has no item.

    `tile_tokens`: queries of a prompt that share their loads.
    """
    queries = np.diff(query_starts)
    used = np.flatnonzero(context_lens)
    is_decode = queries[used] == 1
    decode, merges, num_partials = _decode_items(used[is_decode], query_starts, context_lens)
    prompts = _prompt_items(used[~is_decode], query_starts, context_lens, tile_tokens)
    return AttentionWork(items=np.concatenate([decode, prompts]), merges=merges, num_partials=num_partials)


def _decode_items(rows: Int32s, query_starts: Int32s, context_lens: Int32s) -> tuple[Int32s, Int32s, int]:
    stretches = -(-context_lens[rows] // SPLIT)
    each = -(-stretches // MAX_ITEMS)
    counts = -(-stretches // each)
    number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)  # of an item in its row
    items = np.zeros((len(number), ATTENTION_ITEM), np.int32)
    items[:, 0] = np.repeat(rows, counts)
    items[:, 1] = query_starts[items[:, 0]]
    items[:, 2] = 1
    items[:, 3] = number * np.repeat(each, counts)
    items[:, 4] = np.minimum(items[:, 3] + np.repeat(each, counts), np.repeat(stretches, counts))
    in_parts = counts > 1
    parts = np.where(in_parts, counts, 0)
    first = np.cumsum(parts) - parts
    items[:, 5] = np.where(np.repeat(in_parts, counts), np.repeat(first, counts) + number, -1)
    merges = np.zeros((int(in_parts.sum()), ATTENTION_ITEM), np.int32)
    for field, values in enumerate((query_starts[rows], first, counts, rows, each)):
        merges[:, field] = values[in_parts]
    return items, merges, int(parts.sum())


def _prompt_items(rows: Int32s, query_starts: Int32s, context_lens: Int32s, tile_tokens: int) -> Int32s:
    begins, ends = query_starts[rows], query_starts[rows + 1]
    counts = -(-(ends - begins) // tile_tokens)
    number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)  # of a tile in its row
    items = np.zeros((len(number), ATTENTION_ITEM), np.int32)
    items[:, 0] = np.repeat(rows, counts)
    items[:, 1] = np.repeat(begins, counts) + number * tile_tokens
    items[:, 2] = np.minimum(tile_tokens, np.repeat(ends, counts) - items[:, 1])
    seen = np.repeat(context_lens[rows] - ends, counts) + items[:, 1] + items[:, 2]  # by the tile's last query
    items[:, 4] = -(-seen // SPLIT)
    items[:, 5] = -1
    return items
