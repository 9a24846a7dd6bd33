"""What happens to rows between the products of a decoder, in a few lines of torch: the specification of its kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import gelu, relu, silu

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": silu,
    "gelu_tanh": lambda x: gelu(x, approximate="tanh"),
    "squared_relu": lambda x: relu(x).square(),
}


def norm(x: Tensor, weight: Tensor, eps: float, *, bias: Tensor | None = None, centres: bool = False) -> Tensor:
    """x [..., hidden] / RMS(x) * weight + bias, rounded once; `centres`: of x without its mean."""
    wide = x.float()
    if centres:
        wide = wide - wide.mean(-1, keepdim=True)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    normed = wide * scale * weight.float()
    return (normed if bias is None else normed + bias.float()).to(x.dtype)


def add_norm(
    y: Tensor, residual: Tensor, x: Tensor | None, weight: Tensor, eps: float, *, bias: Tensor | None = None,
    centres: bool = False,
) -> None:  # fmt: skip
    """residual += x, y = norm(residual), all [tokens, hidden]; without x the residual is only read."""
    if x is not None:
        residual.copy_(residual.float() + x.float())
    y.copy_(norm(residual, weight, eps, bias=bias, centres=centres))


def norm_rows(
    y: Tensor, residual: Tensor, index: Tensor, *, x: Tensor | None, weight: Tensor, eps: float,
    bias: Tensor | None = None, centres: bool = False,
) -> None:  # fmt: skip
    """y [n, hidden] = norm(residual + x) of the rows in `index` int64 [n], the residual being left as it was."""
    add_norm(y, residual[index], None if x is None else x[index], weight, eps, bias=bias, centres=centres)


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
    neighbours: bool = False,
) -> None:
    """Queries in place, keys and values to their slots, -1 being none; keys and values stay in qkv as they were.

    qkv [tokens, (heads + 2 * kv_heads) * head_dim]; keys, values [pages, page_size, kv_heads, head_dim]; positions
    (int32 or int64) and kv_slots (int64) [tokens]; cos, sin fp32 [positions, rotary_dim], whose second half is as the
    first; q_norm, k_norm [head_dim]; `neighbours`: column 2 i turns with 2 i + 1, else i with half + i.
    """
    rows = qkv.view(len(qkv), heads + 2 * kv_heads, head_dim)
    q, k, v = rows[:, :heads], rows[:, heads : heads + kv_heads], rows[:, heads + kv_heads :]
    at = positions.long()
    stored = kv_slots >= 0
    angles = cos[at][:, None], sin[at][:, None]
    turn = _turn_neighbours if neighbours else _turn_halves
    q.copy_(_turned(_normed(q, q_norm, eps), *angles, turn))
    turned = _turned(_normed(k, k_norm, eps), *angles, turn).to(k.dtype)
    keys.view(-1, kv_heads, head_dim)[kv_slots[stored]] = turned[stored]
    values.view(-1, kv_heads, head_dim)[kv_slots[stored]] = v[stored]


def _normed(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return x.float() if weight is None else norm(x.float(), weight, eps)


def _turned(x: Tensor, cos: Tensor, sin: Tensor, turn: Callable[..., Tensor]) -> Tensor:
    """x [tokens, heads, head_dim], the first rotary_dim columns turned by cos and sin [tokens, 1, rotary_dim]."""
    width = cos.shape[-1]
    return torch.cat([turn(x[..., :width], cos, sin), x[..., width:]], -1)


def _turn_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def _turn_neighbours(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    first, second = x[..., ::2], x[..., 1::2]
    cos, sin = cos[..., :half], sin[..., :half]
    return torch.stack([first * cos - second * sin, second * cos + first * sin], -1).flatten(-2)


def activate(out: Tensor, x: Tensor, kind: str, *, gated: bool = True) -> None:
    """out [tokens, width] = act(gate) * up, where x [tokens, 2 * width] has the gates first; not gated: act(x)."""
    gate, up = x.float().chunk(2, -1) if gated else (x.float(), 1.0)
    out.copy_(ACTIVATIONS[kind](gate) * up)
