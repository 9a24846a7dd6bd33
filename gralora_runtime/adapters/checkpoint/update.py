"""What an adapter adds to one weight, as the low-rank pairs that it is made of: their sum, and its size. Knows no file.

k blocks cut a weight [out, in] into k times k, each of rank r/k. Pairs of different k are compared on the finest grid
that all of them have lines on, block by block: no weight is ever formed, and a block's rank stays small.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gralora_runtime.adapters.checkpoint.experts import each_a, each_b
from gralora_runtime.adapters.checkpoint.plan import ModulePlan, PartTensors


@dataclass(frozen=True, slots=True)
class LowRank:
    """One pair. A plain one, LoRA's or a hybrid's, is one block. Or the pairs of a mixture's experts, `is_stack`, each
    for a weight of its own: a [experts, in, r], b [experts, r, out]."""

    a: Tensor  # [k, in/k, r]
    b: Tensor  # [k, r, out/k]
    scale: float
    is_stack: bool = False

    @property
    def k(self) -> int:
        return len(self.a)

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in), or (experts, out, in)"""
        if self.is_stack:
            return len(self.a), self.b.shape[2], self.a.shape[1]
        return self.k * self.b.shape[2], self.k * self.a.shape[1]


Update = tuple[LowRank, ...]


def update_of(module: ModulePlan, tensors: Mapping[str, Tensor]) -> Update:
    """What a checkpoint with these tensors adds to a module."""
    return tuple(_stored(pair, tensors[pair.a_name], tensors[pair.b_name]) for pair in module.parts)


def _stored(pair: PartTensors, a: Tensor, b: Tensor) -> LowRank:
    if pair.experts > 1:
        return LowRank(each_a(a, pair.experts), each_b(b, pair.experts), pair.part.scale, is_stack=True)
    return LowRank(as_blocks(a), as_blocks(b), pair.part.scale)


def as_blocks(stored: Tensor) -> Tensor:
    """A tensor of a checkpoint: blocks as they are; of a plain pair, A [r, in] or B [out, r], the one block."""
    return stored if stored.ndim == 3 else stored.T[None]


def minus(update: Update) -> Update:
    return tuple(replace(pair, scale=-pair.scale) for pair in update)


def dense(pair: LowRank) -> Tensor:
    """The matrix [out, in] in float32, or the experts' [experts, out, in]."""
    if pair.is_stack:
        return torch.einsum("ero,eir->eoi", pair.b.float(), pair.a.float()) * pair.scale
    k, width, r = pair.a.shape
    a = pair.a.float().view(k, width, k, r // k)  # [n, i, j, c]
    b = pair.b.float().view(k, k, r // k, -1)  # [j, n, c, o]
    return torch.einsum("jnco,nijc->joni", b, a).reshape(pair.shape) * pair.scale


def norm(pairs: Sequence[LowRank]) -> float:
    """The Frobenius norm of the sum of these pairs, exact to float64's last digits even if they all but cancel."""
    squares = 0.0
    for a, b in _block_rows(pairs, torch.float64):
        # Of an orthogonal times a triangular matrix, the triangular ones alone decide: few numbers, taken off each
        # other before they are squared.
        inner = _triangle(b.transpose(1, 2)) @ _triangle(a).transpose(1, 2)
        squares += float(inner.square().sum())
    return math.sqrt(squares)


def rough_norm(pairs: Sequence[LowRank]) -> float:
    """The same in float32 and several times as fast, for pairs that do not cancel; infinite or NaN if it overflows."""
    squares = sum(
        float(((a.transpose(1, 2) @ a) * (b @ b.transpose(1, 2))).sum()) for a, b in _block_rows(pairs, torch.float32)
    )
    return math.sqrt(max(squares, 0.0)) if not math.isnan(squares) else squares


def _triangle(matrices: Tensor) -> Tensor:
    triangle: Tensor = torch.linalg.qr(matrices, mode="r")[1]
    return triangle


def _block_rows(pairs: Sequence[LowRank], dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """For each row of blocks of the grid: A [blocks, in/blocks, rank] and B [blocks, rank, out/blocks], all pairs'. A
    stack's experts are one such row: their weights' entries, too, are apart."""
    if any(pair.is_stack for pair in pairs):
        yield (
            torch.cat([pair.a.to(dtype) for pair in pairs], dim=2),
            torch.cat([pair.b.to(dtype) * pair.scale for pair in pairs], dim=1),
        )
        return
    blocks = math.lcm(*(pair.k for pair in pairs)) if pairs else 0
    for row in range(blocks):
        factors = [_block_row(pair, row, blocks, dtype) for pair in pairs]
        yield torch.cat([a for a, _ in factors], dim=2), torch.cat([b for _, b in factors], dim=1)


def _block_row(pair: LowRank, row: int, blocks: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    k, width, r = pair.a.shape
    rank, finer = r // k, blocks // k
    j, part = divmod(row, finer)
    a = pair.a[:, :, j * rank : (j + 1) * rank].to(dtype).reshape(blocks, width // finer, rank)
    columns = pair.b.shape[2] // finer
    b = pair.b[j, :, part * columns : (part + 1) * columns].to(dtype).view(k, rank, columns) * pair.scale
    return a, b.repeat_interleave(finer, dim=0)
