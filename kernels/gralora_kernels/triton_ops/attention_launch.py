"""Paged attention of one model: sizes, memory and launches. A layer is one launch, and one more for long contexts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import gcd
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gralora_kernels.attention_work import ATTENTION_ITEM, SPLIT, AttentionWork, Int32s, max_partials, plan_attention
from gralora_kernels.replay import ReplayError
from gralora_kernels.triton_ops.attention import attention_kernel, merge_kernel
from gralora_kernels.triton_ops.early import EARLY_OPTIONS
from gralora_kernels.triton_ops.memory import at_least, gpu_kind, num_processors, staged
from gralora_kernels.triton_ops.variant import ELEMENT_NAMES, VECTOR_BYTES, Variant

COUNTS = 4  # words before the lists: 16 bytes
PROGRAMS_PER_PROCESSOR = 8  # of a captured launch; more items than that take turns
MERGES_PER_LAUNCH = 32  # programs a head of a captured launch
ENOUGH_PER_PROCESSOR = 4  # items times KV heads, with which long rows need no cutting


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionShape:
    """What is the same in all layers. `q_row`: heads in a row of q's tensor, keys' and values' included if they are."""

    heads: int
    kv_heads: int
    head_dim: int
    page_size: int
    q_row: int

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.heads // self.kv_heads


@dataclass(frozen=True, slots=True)
class Tile:
    """Rows (tokens times heads of a group) and positions of a tile, and how it is compiled."""

    rows: int
    positions: int
    warps: int
    stages: int
    registers: int | None = None  # most of a thread; left alone, NVIDIA's assembler may choose fewer and spill
    in_one_go: bool = False  # a prompt's sums, in an order that depends on how it was cut

    def programs_per_group(self, group: int) -> int:
        """Programs that share the query heads of a KV head. Each reads its keys and values."""
        return -(-group // self.rows)


@dataclass(frozen=True, slots=True)
class Tiles:
    """By what a step is. `wide`: single tokens of heads that share keys and values in groups of more than 16."""

    single_tokens: Tile
    wide: Tile
    prompts: Tile


# By bytes of an element and columns of a head, padded to a power of two. 16 rows are the least that tensor cores take.
# Wider heads and fp32, which NVIDIA multiplies without tensor cores, get smaller tiles: what the accumulators and one
# tile of keys and values leave of 255 registers. Whether the assembler spills without a limit changes with the number
# of heads and with the stride of q, so nearly all have one. On AMD larger ones spilled: prompts have those of `wide`.
TILES = {
    (2, 64): Tiles(Tile(16, 64, 4, 2), Tile(64, 64, 8, 2, 255), Tile(128, 64, 8, 3, 255, in_one_go=True)),
    (2, 128): Tiles(Tile(16, 64, 4, 2, 200), Tile(64, 32, 8, 2, 255), Tile(128, 64, 8, 3, 255, in_one_go=True)),
    (2, 256): Tiles(Tile(16, 32, 4, 3), Tile(32, 16, 8, 2, 255), Tile(64, 32, 8, 2, 255, in_one_go=True)),
    (4, 64): Tiles(Tile(16, 32, 4, 2, 128), Tile(32, 32, 8, 2, 128), Tile(32, 32, 8, 2, 128, in_one_go=True)),
    (4, 128): Tiles(Tile(16, 32, 8, 2, 128), Tile(32, 16, 8, 2, 128), Tile(32, 16, 8, 2, 128, in_one_go=True)),
    (4, 256): Tiles(Tile(16, 16, 8, 1, 128), Tile(16, 16, 8, 1, 128), Tile(16, 16, 8, 1, 128, in_one_go=True)),
}


class PagedAttention:
    """Attention of all layers of one model on one device. Calls belong on one stream.

    For CUDA graphs there is `frozen`: an instance whose memory and launches never change.
    """

    def __init__(self, shape: AttentionShape, dtype: torch.dtype, device: torch.device, *, invariant: bool) -> None:
        """`invariant`: prompts are computed in the tiles of single tokens, so that all sums have one order."""
        self._shape = shape
        self._dtype = dtype
        self._device = device
        self._invariant = invariant
        self._frozen_rows: int | None = None
        self._frozen_merges = 0
        self._work: AttentionWork | None = None
        self._words = torch.empty(0, dtype=torch.int32, device=device)  # counts, items, merges
        self._sums = torch.empty(0, dtype=torch.float32, device=device)
        self._stats = torch.empty(0, dtype=torch.float32, device=device)
        self._first_merge = COUNTS
        self._has_prompts = False

    def frozen(self, max_rows: int, max_model_len: int) -> PagedAttention:
        """An instance for steps of at most so many single tokens; `prepare` refuses all others with `ReplayError`."""
        other = PagedAttention(self._shape, self._dtype, self._device, invariant=self._invariant)
        partials = max_partials(max_rows, max_model_len)
        other._reserve(max(partials, max_rows), max_rows, partials)
        other._words.zero_()  # before its first step there is nothing to do
        other._frozen_rows = max_rows
        other._frozen_merges = MERGES_PER_LAUNCH if max_model_len > SPLIT else 0
        return other

    def prepare(self, query_starts: Int32s, context_lens: Int32s) -> None:
        """Make the step's items and send them over, without waiting for the device. Both in host memory."""
        rows, longest = len(context_lens), int(np.diff(query_starts).max())
        if self._frozen_rows is None:
            self._has_prompts = longest > 1
        elif rows > self._frozen_rows or longest > 1:
            what = ("rows", rows, self._frozen_rows) if longest <= 1 else ("tokens of a row", longest, 1)
            raise ReplayError(*what)
        enough = max(1, ENOUGH_PER_PROCESSOR * num_processors(self._device) // self._shape.kv_heads)
        work = plan_attention(query_starts, context_lens, max(1, self._tile().rows // self._shape.group), enough)
        if self._frozen_rows is None:
            self._reserve(len(work.items), len(work.merges), work.num_partials)
        self._work = work
        words = np.zeros(self._first_merge + work.merges.size, np.int32)
        words[:2] = len(work.items), len(work.merges)
        words[COUNTS:][: work.items.size] = work.items.reshape(-1)
        words[self._first_merge :] = work.merges.reshape(-1)
        self._words[: len(words)].copy_(staged(torch.from_numpy(words), self._device), non_blocking=True)

    def attend(
        self, out: Tensor, q: Tensor, keys: Tensor, values: Tensor, *, page_table: Tensor, query_starts: Tensor,
        context_lens: Tensor, scale: float, window: int, softcap: float = 0.0, sinks: Tensor | None = None,
    ) -> None:  # fmt: skip
        """out [tokens, heads * head_dim] of q [tokens, q_row * head_dim], whose first heads are the queries.

        keys, values [pages, page_size, kv_heads, head_dim]; page_table int32 [rows, pages]; query_starts int32 [rows +
        1]; context_lens int32 [rows], the step's own tokens included, 0: padding. Window 0: the whole context, else so
        many positions. Softcap 0: none. sinks [heads]: scores without a value.
        """
        shape = self._shape
        items, merges = self._programs(len(context_lens))
        if not items:
            return
        _check(out, q, keys, shape)
        tile = self._tile()
        attention_kernel[(items, shape.kv_heads * tile.programs_per_group(shape.group))](
            out, q, keys, values, page_table, query_starts, context_lens, self._words[COUNTS:], self._words,
            self._sums, self._stats, sinks, page_table.stride(0), window, scale, softcap,
            **constants_for(shape, tile, self._dtype, has_softcap=softcap > 0), **options_for(tile, gpu_kind()),
            **EARLY_OPTIONS,
        )  # fmt: skip
        if merges:
            merge_kernel[(merges, shape.heads)](
                out, self._words[self._first_merge :], self._words, context_lens, self._sums, self._stats, sinks,
                window, HEADS=shape.heads, D=shape.head_dim, SPLIT=SPLIT, BLOCK_D=_padded(shape.head_dim),
                **MERGE_OPTIONS, **EARLY_OPTIONS,
            )  # fmt: skip

    def _reserve(self, num_items: int, num_merges: int, num_partials: int) -> None:
        shape = self._shape
        self._first_merge = COUNTS + num_items * ATTENTION_ITEM
        self._words = at_least(self._words, self._first_merge + num_merges * ATTENTION_ITEM)
        self._sums = at_least(self._sums, num_partials * shape.heads * shape.head_dim)
        self._stats = at_least(self._stats, num_partials * shape.heads * 2)

    def _programs(self, rows: int) -> tuple[int, int]:
        """Of each launch, on its first axis."""
        if self._frozen_rows is None:
            assert self._work is not None, "attend before prepare"
            return len(self._work.items), len(self._work.merges)
        most = PROGRAMS_PER_PROCESSOR * num_processors(self._device) // self._shape.kv_heads
        return max(rows, most), min(rows, self._frozen_merges)

    def _tile(self) -> Tile:
        has_prompts = self._has_prompts and not self._invariant
        return tile_for(self._shape, self._dtype, gpu_kind(), has_prompts=has_prompts)


MERGE_OPTIONS = {"num_warps": 1, "num_stages": 3}
NO_SINKS = {"sinks": None}  # those are read once, behind all loops


def tile_for(shape: AttentionShape, dtype: torch.dtype, gpu_kind: str, *, has_prompts: bool) -> Tile:
    """All heads of a group are in one tile if it has rows for them, so that they share their loads."""
    tiles = TILES[dtype.itemsize, max(64, _padded(shape.head_dim))]
    if has_prompts:
        return replace(tiles.wide, in_one_go=True) if gpu_kind == "hip" else tiles.prompts
    return tiles.wide if shape.group > tiles.single_tokens.rows else tiles.single_tokens


def constants_for(shape: AttentionShape, tile: Tile, dtype: torch.dtype, *, has_softcap: bool) -> dict[str, Any]:
    return {
        "HEADS": shape.heads,
        "KV_HEADS": shape.kv_heads,
        "Q_ROW": shape.q_row,
        "D": shape.head_dim,
        "PAGE": shape.page_size,
        "SPLIT": SPLIT,
        "BLOCK_M": tile.rows,
        "TILE_HEADS": min(shape.group, tile.rows),
        "BLOCK_N": tile.positions,
        "BLOCK_D": _padded(shape.head_dim),
        "ALIGN": gcd(shape.head_dim, VECTOR_BYTES // dtype.itemsize),
        "HAS_SOFTCAP": has_softcap,
        "IN_ONE_GO": tile.in_one_go,
    }


def options_for(tile: Tile, gpu_kind: str) -> dict[str, int]:
    """Compiler options. AMD has 64 KB of shared memory, and registers for one tile at a time."""
    if gpu_kind == "hip":
        return {"num_warps": tile.warps, "num_stages": 1}
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    return options if tile.registers is None else options | {"maxnreg": tile.registers}


# heads, kv_heads, head_dim, with a soft cap: Llama-3-8B's, a head that is no power of two, Gemma's widest.
AUDITED = ((32, 8, 128, False), (9, 3, 64, False), (32, 8, 80, False), (16, 8, 256, True))


def variants(dtype: torch.dtype) -> list[Variant]:
    """The forms for the heads of well-known models; every other head gets its own."""
    element = f"*{ELEMENT_NAMES[dtype]}"
    pointers = dict.fromkeys(("out", "q", "keys", "values"), element)
    pointers |= dict.fromkeys(("page_table", "query_starts", "context_lens", "items", "counts", "merges"), "*i32")
    pointers |= dict.fromkeys(("partial_sums", "partial_stats"), "*fp32")
    found = []
    for heads, kv_heads, head_dim, has_softcap in AUDITED:
        shape = AttentionShape(
            heads=heads, kv_heads=kv_heads, head_dim=head_dim, page_size=16, q_row=heads + 2 * kv_heads
        )
        kinds: dict[tuple[bool, Tile], list[str]] = {}
        for has_prompts in (False, True):
            for kind in ("cuda", "hip"):
                tile = tile_for(shape, dtype, kind, has_prompts=has_prompts)
                kinds.setdefault((has_prompts, tile), []).append(kind)
        for (has_prompts, tile), of_kinds in kinds.items():
            what = ", prompts" if has_prompts else ""
            what += ", soft cap" if has_softcap else ""
            found.append(
                Variant(
                    name=f"attention, {tile.rows} rows, heads of {head_dim}{what}",
                    function=attention_kernel,
                    dtype=dtype,
                    constants=constants_for(shape, tile, dtype, has_softcap=has_softcap) | NO_SINKS,
                    pointers={name: to for name, to in pointers.items() if name in attention_kernel.arg_names},
                    floats=("scale", "softcap"),
                    options={kind: options_for(tile, kind) for kind in of_kinds},
                    wide_loads=("b_k", "b_v"),  # queries are read once, and AMD has more threads than pieces of them
                    is_product=True,
                )
            )
    merge = {"HEADS": 32, "D": 128, "SPLIT": SPLIT, "BLOCK_D": 128} | NO_SINKS
    found.append(
        Variant(
            name="attention, merge",
            function=merge_kernel,
            dtype=dtype,
            constants=merge,
            pointers={name: to for name, to in pointers.items() if name in merge_kernel.arg_names},
            options=dict.fromkeys(("cuda", "hip"), MERGE_OPTIONS),
        )
    )
    return found


def _padded(head_dim: int) -> int:
    return max(16, 1 << (head_dim - 1).bit_length())


def _check(out: Tensor, q: Tensor, keys: Tensor, shape: AttentionShape) -> None:
    assert out.is_contiguous(), out.stride()
    assert q.is_contiguous(), q.stride()
    assert q.shape[1] == shape.q_row * shape.head_dim, (q.shape, shape)
    assert out.shape == (len(q), shape.heads * shape.head_dim), (out.shape, q.shape)
    assert keys.shape[1:] == (shape.page_size, shape.kv_heads, shape.head_dim), (keys.shape, shape)
