"""The keys and values of all sequences, in pages. Knows tensors, not who owns which page (`pages.py` does)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gralora_runtime.memory import lazy_zeros


class KVPool:
    """One K and one V tensor per layer, laid out as attention wants them.

    Both [pages, page_size, kv_heads, head_dim]; or `in_panels`, for the CPU's kernels: keys [pages, kv_heads, head_dim,
    page_size], values [pages, kv_heads, page_size, head_dim].
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_pages: int,
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        in_panels: bool,
    ) -> None:
        self._page_size = page_size
        self.in_panels = in_panels
        keys = values = (num_pages, page_size, num_kv_heads, head_dim)
        if in_panels:
            keys = (num_pages, num_kv_heads, head_dim, page_size)
            values = (num_pages, num_kv_heads, page_size, head_dim)
        self.keys = [lazy_zeros(keys, dtype, device) for _ in range(num_layers)]
        self.values = [lazy_zeros(values, dtype, device) for _ in range(num_layers)]

    def write(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store keys and values [tokens, kv_heads, head_dim] at slots [tokens] (page * page_size + offset)."""
        if self.in_panels:
            pages, offsets = slots // self._page_size, slots % self._page_size
            self.keys[layer][pages, :, :, offsets] = keys
            self.values[layer][pages, :, offsets] = values
        else:
            self.keys[layer].flatten(0, 1).index_copy_(0, slots, keys)
            self.values[layer].flatten(0, 1).index_copy_(0, slots, values)


def kv_shape(config: Any) -> dict[str, int]:
    """num_layers, num_kv_heads and head_dim of a model's configuration."""
    heads = config.num_attention_heads
    return {
        "num_layers": config.num_hidden_layers,
        "num_kv_heads": getattr(config, "num_key_value_heads", None) or heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
    }


def page_bytes(*, num_layers: int, page_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes that one page takes, keys and values of all layers together."""
    return 2 * num_layers * page_size * num_kv_heads * head_dim * dtype.itemsize
