"""Writes a step's work lists from a `Listing`: items that `plan_work` would have made on the host."""

# Triton reads annotations as code and knows only its own.
# ruff: noqa: ANN001, ANN201, PLR0917
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["tile_tokens"])
def list_kernel(
    items,  # int32 [items, 8]
    pieces,  # int32 [pieces, 8]: of slot 0
    segments,  # int32 [segments, 4]: slot, first position in order, tokens, tiles
    parts,  # int32 [lists, segments, 4]: first item, first piece, pieces
    tile_tokens,
    ENTRIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program: one segment's items in one list. Tiles that read the same weights are neighbours, so that all but the
    first find them in the cache."""
    segment = segments + tl.program_id(0) * 4
    part = parts + (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)) * 4
    first_item, first_piece, count = tl.load(part).to(tl.int64), tl.load(part + 1), tl.load(part + 2)
    slot, first, length, tiles = tl.load(segment), tl.load(segment + 1), tl.load(segment + 2), tl.load(segment + 3)
    for start in range(0, count * tiles, BLOCK):
        i = start + tl.arange(0, BLOCK)
        mask = i < count * tiles
        piece = pieces + (first_piece + i // tiles).to(tl.int64) * 8
        item = items + (first_item + i) * 8
        done = i % tiles * tile_tokens
        tl.store(item, tl.load(piece, mask=mask, other=0) + slot * ENTRIES, mask=mask)
        tl.store(item + 1, first + done, mask=mask)
        tl.store(item + 2, tl.minimum(length - done, tile_tokens), mask=mask)
        for field in tl.static_range(3, 8):
            tl.store(item + field, tl.load(piece + field, mask=mask, other=0), mask=mask)
