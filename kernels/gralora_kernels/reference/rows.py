"""What happens to rows between the products of a decoder, in a few lines of torch: the specification of its kernels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., hidden] / RMS(x) * weight, rounded once."""
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * weight.float()).to(x.dtype)


def add_rms_norm(y: Tensor, residual: Tensor, x: Tensor | None, weight: Tensor, eps: float) -> None:
    """residual += x, y = norm(residual), all [tokens, hidden]; without x the residual is only read."""
    if x is not None:
        residual.copy_(residual.float() + x.float())
    y.copy_(rms_norm(residual, weight, eps))


def rms_norm_rows(y: Tensor, residual: Tensor, index: Tensor, *, x: Tensor | None, weight: Tensor, eps: float) -> None:
    """y [n, hidden] = norm(residual + x) of the rows in `index` int64 [n], the residual being left as it was."""
    add_rms_norm(y, residual[index], None if x is None else x[index], weight, eps)


def rotate_and_store(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    kv_slots: Tensor,
    *,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    kv_heads: int,
    head_dim: int,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
) -> None:
    """Queries in place, keys and values to their slots, -1 being none; keys and values stay in qkv as they were.

    qkv [tokens, (heads + 2 * kv_heads) * head_dim]; keys, values [pages, page_size, kv_heads, head_dim]; positions
    (int32 or int64) and kv_slots (int64) [tokens]; cos, sin fp32 [positions, rotary_dim], whose second half is as the
    first; q_norm, k_norm [head_dim].
    """
    rows = qkv.view(len(qkv), heads + 2 * kv_heads, head_dim)
    q, k, v = rows[:, :heads], rows[:, heads : heads + kv_heads], rows[:, heads + kv_heads :]
    at = positions.long()
    stored = kv_slots >= 0
    q.copy_(_turn(q, q_norm, cos[at], sin[at], eps))
    keys.view(-1, kv_heads, head_dim)[kv_slots[stored]] = _turn(k, k_norm, cos[at], sin[at], eps)[stored]
    values.view(-1, kv_heads, head_dim)[kv_slots[stored]] = v[stored]


def _turn(x: Tensor, norm: Tensor | None, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """x [tokens, heads, head_dim], the first rotary_dim columns turned by cos and sin [tokens, rotary_dim]."""
    wide = x.float() if norm is None else rms_norm(x.float(), norm, eps)
    turned, kept = wide[..., : cos.shape[1]], wide[..., cos.shape[1] :]
    first, second = turned.chunk(2, -1)
    turned = turned * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]
    return torch.cat([turned, kept], -1).to(x.dtype)


def gated_activation(out: Tensor, gates_and_ups: Tensor, kind: str) -> None:
    """out [tokens, width] = act(gate) * up, where gates_and_ups [tokens, 2 * width] has the gates first."""
    gate, up = gates_and_ups.float().chunk(2, -1)
    out.copy_((silu(gate) if kind == "silu" else gelu(gate, approximate="tanh")) * up)
