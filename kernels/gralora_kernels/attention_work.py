"""A step's attention cut into items for the GPU. Plain numpy; knows no kernel and no layer.

The context of a row is cut into stretches of `SPLIT` positions. A row that decodes has several items if its context is
long, each for some of its stretches; their results are merged in order by a second kernel. Queries of a prompt share
tiles, and each tile does all stretches that it sees.

A step of many rows has items enough without cutting those that are not longer than others. That changes no bit: an item
for all stretches adds them up in the order in which items for one each are merged. Only rows of more than `MAX_ITEMS`
stretches have several in an item; they are always cut, and in the same way.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

ATTENTION_ITEM = 8
SPLIT = 256  # positions
MAX_ITEMS = 64  # of a row that decodes: contexts of more than 16,384 have several stretches in each

Int32s = npt.NDArray[np.int32]
Rows = npt.NDArray[np.intp]


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


def plan_attention(
    query_starts: Int32s, context_lens: Int32s, tile_tokens: int, enough_items: int = 1 << 30
) -> AttentionWork:
    """`query_starts` [rows + 1], `context_lens` [rows]; a row of context 0 is padding and has no item.

    `tile_tokens`: queries of a prompt that share their loads. `enough_items`: of rows that decode, for a busy GPU.
    """
    queries = query_starts[1:] - query_starts[:-1]
    is_used = context_lens > 0
    is_decode = is_used & (queries == 1)
    items, merges, num_partials = _decode_items(is_decode.nonzero()[0], query_starts, context_lens, enough_items)
    if (prompts := (is_used & (queries > 1)).nonzero()[0]).size:
        items = np.concatenate([items, _prompt_items(prompts, query_starts, context_lens, tile_tokens)])
    return AttentionWork(items=items, merges=merges, num_partials=num_partials)


def _decode_items(
    rows: Rows, query_starts: Int32s, context_lens: Int32s, enough_items: int
) -> tuple[Int32s, Int32s, int]:
    tokens = query_starts[rows]
    stretches = (context_lens[rows] + (SPLIT - 1)) // SPLIT
    fields = np.zeros((ATTENTION_ITEM, len(rows)), np.int32)  # each row as if it were one item
    fields[0], fields[1], fields[2], fields[4], fields[5] = rows, tokens, 1, stretches, -1
    fair = min(MAX_ITEMS, max(1, -(-int(stretches.sum()) // enough_items)))  # stretches that an item may have
    in_parts = (stretches > fair).nonzero()[0]
    if not in_parts.size:
        return np.ascontiguousarray(fields.T), np.zeros((0, ATTENTION_ITEM), np.int32), 0
    each = (stretches + (MAX_ITEMS - 1)) // MAX_ITEMS
    each[stretches <= fair] = fair
    counts = (stretches + (each - 1)) // each
    parts = counts[in_parts]
    first = parts.cumsum(dtype=np.int32) - parts
    merges = np.zeros((len(parts), ATTENTION_ITEM), np.int32)
    for field, values in enumerate((tokens[in_parts], first, parts, rows[in_parts], each[in_parts])):
        merges[:, field] = values
    fields[3], fields[6] = each, counts.cumsum(dtype=np.int32) - counts
    fields[5, in_parts] = first
    # As many copies of a row as it has items, counted up from its first (field 6). A whole row has one, number 0.
    fields = fields.repeat(counts, axis=1)
    number = np.arange(fields.shape[1], dtype=np.int32) - fields[6]
    begins = fields[3] * number
    fields[4] = np.minimum(fields[4], begins + fields[3])
    fields[3], fields[6] = begins, 0
    fields[5] += number
    return np.ascontiguousarray(fields.T), merges, int(first[-1] + parts[-1])


def _prompt_items(rows: Rows, query_starts: Int32s, context_lens: Int32s, tile_tokens: int) -> Int32s:
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
    return np.ascontiguousarray(items[::-1])  # those that see most come first, so that none is left alone at the end
