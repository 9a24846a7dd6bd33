"""The "triton" backend: sizes and launches shrink and expand, one launch each per linear layer for all adapters."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from gralora_kernels.grouping import Grouping
from gralora_kernels.tables import ENTRIES, ModuleTable
from gralora_kernels.triton_ops.expand import expand_kernel
from gralora_kernels.triton_ops.shrink import shrink_kernel

BLOCK_R = 16  # the smallest that tensor cores take: most adapters have r <= 16
BLOCK_K = 64
BLOCK_N = 64
SMALL_TILE, FULL_TILE = 16, 32  # tokens per program; a decode step has one or two tokens per adapter


class TritonBackend:
    """One device. Holds the intermediate u: calls belong on one stream."""

    name = "triton"
    panel = 0

    def __init__(self, device: torch.device) -> None:
        if device.type == "cpu" and not triton.knobs.runtime.interpret:
            raise ValueError("backend 'triton' cannot serve the CPU, except under Triton's interpreter")
        if device.type == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("backend 'triton' was asked for, but torch sees no GPU")
        self._u = torch.empty(0, device=device)

    def apply(self, y: Tensor, x: Tensor, arena: Tensor, table: ModuleTable, grouping: Grouping) -> None:
        """y [tokens, out] += adapter(x [tokens, in]) for the tokens that have an adapter."""
        layouts = table.host_index[grouping.slots, :, 2:]  # [segments, ENTRIES, (r, k)]
        ranks, ks = layouts[..., 0], layouts[..., 1]
        if not ranks.any():
            return
        _check(y, (grouping.num_tokens, table.out_features), arena.dtype)
        _check(x, (grouping.num_tokens, table.in_features), arena.dtype)
        assert grouping.max_item_tokens <= FULL_TILE, "the grouping's tiles are longer than the kernel's"
        if self._u.numel() < grouping.num_adapted * grouping.max_width:
            self._u = torch.empty(grouping.num_adapted * grouping.max_width, device=y.device)
        present = [int(k) for k in set(ks[ranks > 0].tolist())]
        block_m = SMALL_TILE if grouping.max_item_tokens <= SMALL_TILE else FULL_TILE
        tiles = int((-(-ranks // BLOCK_R) * ks).max())
        entries = ENTRIES if ranks[:, 1:].any() else 1
        work = (grouping.device_order, grouping.device_items)
        shrink_kernel[(grouping.num_items, tiles, entries)](
            x, arena, table.index, table.scale, *work, self._u, table.in_features, grouping.max_width,
            ENTRIES=ENTRIES, BLOCK_M=block_m, BLOCK_R=BLOCK_R, BLOCK_K=BLOCK_K,
            ALIGNED=_aligned(table.in_features, present),
        )  # fmt: skip
        expand_kernel[(grouping.num_items, triton.cdiv(table.out_features, BLOCK_N))](
            y, arena, table.index, *work, self._u, table.out_features, grouping.max_width,
            ENTRIES=ENTRIES, BLOCK_M=block_m, BLOCK_N=BLOCK_N, BLOCK_R=BLOCK_R,
            ALIGNED=_aligned(table.out_features, present),
        )  # fmt: skip


def _aligned(features: int, ks: list[int]) -> bool:
    """Whether the kernels may promise the compiler that every block begins at a multiple of 16 elements."""
    return all(features // k % 16 == 0 for k in ks)


def _check(tensor: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> None:
    if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_contiguous():
        raise ValueError(
            f"the triton backend needs contiguous {dtype} {shape}, got {tensor.dtype} {tuple(tensor.shape)} "
            f"with strides {tensor.stride()}"
        )
