"""Every kernel on this device against its few lines of torch, on awkward shapes, in memory that was NaN before."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu_check.clock import device
from gralora_kernels.dispatch import resolve_backend
from gralora_kernels.grouping import Grouping
from gralora_kernels.reference import rows as twins
from gralora_kernels.reference.adapters import ReferenceBackend
from gralora_kernels.reference.attention import attention_in_rows
from gralora_kernels.tables import ALIGNMENT, ARENA_SLACK, Entry, GroupTable
from gralora_kernels.triton_ops.activation import gated_activation
from gralora_kernels.triton_ops.adapters.launch import BLOCKING, TritonBackend
from gralora_kernels.triton_ops.attention_launch import AttentionShape, PagedAttention
from gralora_kernels.triton_ops.norm import add_rms_norm
from gralora_kernels.triton_ops.product import linear
from gralora_kernels.triton_ops.rotary import rotate_and_store
from gralora_kernels.work import plan_work

BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}  # RMS error over RMS
LAYOUTS = [[(16, 2)], [(8, 8)], [(3, 1)], [(12, 4), (5, 1)], [(64, 8), (8, 1)], [(1, 1)], [(64, 1)], []]
Check = tuple[str, Callable[[], str]]  # returns what was found; raises AssertionError


def dtypes() -> list[torch.dtype]:
    """The interpreter of a dry run rounds bf16 in its own way."""
    return list(BOUNDS) if torch.cuda.is_available() else [torch.float32]


def checks() -> Iterator[Check]:
    """All of them, by name."""
    for dtype in dtypes():
        kind = str(dtype).removeprefix("torch.")
        for in_features, outs in _widths():
            yield f"adapters {kind} {in_features}->{outs}", _adapters(in_features, outs, dtype)
        for sizes in _heads():
            head_dim, heads, kv_heads, page_size = sizes
            for window, softcap in ((0, 0.0), (300, 0.0), (5, 30.0)):
                name = f"attention {kind} heads {heads}/{kv_heads} of {head_dim}, pages of {page_size}, window {window}"
                yield name, _attention(sizes, dtype, window=window, softcap=softcap)
        yield f"norm, rotary, activation {kind}", _rows(dtype)
        yield f"batch-invariant product {kind}", _product(dtype)
    yield "lists made by the device", _lists


def _widths() -> list[tuple[int, list[int]]]:
    if torch.cuda.is_available():
        return [(4096, [4096, 1024, 1024]), (14336, [4096]), (576, [576, 192, 192]), (2504, [64, 24]), (40, [72, 72])]
    return [(64, [24, 24])]


def _heads() -> list[tuple[int, int, int, int]]:
    if torch.cuda.is_available():
        return [(128, 32, 8, 16), (64, 9, 3, 16), (80, 8, 2, 7), (96, 12, 1, 32), (256, 16, 8, 16), (72, 7, 7, 1)]
    return [(32, 4, 2, 7)]


def _adapters(in_features: int, outs: list[int], dtype: torch.dtype) -> Callable[[], str]:
    def check() -> str:
        layouts = [[(r, k) for r, k in layout if fits(k)] for layout in LAYOUTS]
        group = GroupTable(in_features, outs, len(layouts), device())
        size = 0
        for table in group.modules:
            for slot, layout in enumerate(layouts):
                entries = []
                for r, k in layout:
                    a_offset, size = size, size + -(-r * in_features // ALIGNMENT) * ALIGNMENT
                    b_offset, size = size, size + -(-r * table.out_features // ALIGNMENT) * ALIGNMENT
                    entries.append(Entry(a_offset=a_offset, b_offset=b_offset, r=r, k=k, scale=0.5))
                table.set(slot, entries)
        arena = _random(size + ARENA_SLACK, dtype=dtype) * 0.1
        backend = resolve_backend("triton", device())
        random = np.random.default_rng(0)
        worst, together, slots = 0.0, Tensor(), np.zeros(0, np.int64)
        for tokens in (1, 16, 97) if torch.cuda.is_available() else (3,):
            slots = random.integers(-1, len(layouts), tokens)
            x, y = _random(tokens, in_features, dtype=dtype), _random(tokens, group.out_features, dtype=dtype)
            expected, together = y.clone(), y.clone()
            grouping = _grouping(slots, layouts)
            ReferenceBackend().apply(expected, x, arena, group, grouping)
            backend.prepare([group], grouping)
            backend.apply(together, x, arena, group, grouping)
            worst = max(worst, _error(expected - y, together - y, dtype))
            assert torch.equal(together[slots < 0], y[slots < 0]), "rows without an adapter were changed"
        token = int(np.flatnonzero(slots >= 0)[-1])
        alone = y[token : token + 1].clone()
        grouping = _grouping(slots[token : token + 1], layouts)
        backend.prepare([group], grouping)
        backend.apply(alone, x[token : token + 1].clone(), arena, group, grouping)
        assert torch.equal(alone[0], together[token]), "a token's bits depend on its batch"
        return f"RMS error {worst:.1e}, the bits of a token alone are those in its batch"

    def fits(k: int) -> bool:
        return all(features % k == 0 for features in (in_features, *outs))

    return check


def _attention(
    sizes: tuple[int, int, int, int], dtype: torch.dtype, *, window: int, softcap: float
) -> Callable[[], str]:
    head_dim, heads, kv_heads, page_size = sizes

    def check() -> str:
        contexts = [70, 1100, 33, 1, 20] if torch.cuda.is_available() else [20, 9]
        shape = AttentionShape(
            heads=heads, kv_heads=kv_heads, head_dim=head_dim, page_size=page_size, q_row=heads + 2 * kv_heads
        )
        width = -(-max(contexts) // page_size)
        table = torch.randperm(len(contexts) * width).view(len(contexts), width).int().to(device())
        keys, values = (
            _random(table.numel(), page_size, kv_heads, head_dim, dtype=dtype) for _ in range(2)
        )  # fmt: skip
        queries = [1] * (len(contexts) - 1) + [min(17, contexts[-1])]
        starts = np.cumsum([0, *queries]).astype(np.int32)
        lengths = np.array(contexts, np.int32)
        q = _random(int(starts[-1]), shape.q_row * head_dim, dtype=dtype)
        step = [table, torch.from_numpy(starts).to(device()), torch.from_numpy(lengths).to(device())]
        scale, results = head_dim**-0.5, []
        for invariant in (False, True):
            attention = PagedAttention(shape, dtype, device(), invariant=invariant)
            attention.prepare(starts, lengths)
            out = _nan(len(q), heads * head_dim, dtype=dtype)
            attention.attend(
                out, q, keys, values, page_table=step[0], query_starts=step[1], context_lens=step[2], scale=scale,
                window=window, softcap=softcap,
            )  # fmt: skip
            results.append(out)
        by_head = q.view(len(q), -1, head_dim)[:, :heads].float().cpu()
        expected = torch.zeros(len(q), heads, head_dim)
        pages, begins, ends = (tensor.cpu() for tensor in step)
        attention_in_rows(
            expected, by_head, keys.float().cpu(), values.float().cpu(), pages, begins, ends, scale, window, softcap
        )
        worst = max(_error(expected.flatten(1), out.cpu(), dtype) for out in results)
        last = int(starts[-1]) - 1  # of the prompt: the same position as a single token
        attention.prepare(np.array([0, 1], np.int32), lengths[-1:])
        alone = _nan(1, heads * head_dim, dtype=dtype)
        attention.attend(
            alone, q[last:].clone(), keys, values, page_table=step[0][-1:], query_starts=step[1][:2] - step[1][0],
            context_lens=step[2][-1:], scale=scale, window=window, softcap=softcap,
        )  # fmt: skip
        assert torch.equal(alone[0], results[1][last]), "a token's bits depend on how its prompt was cut"
        return f"RMS error {worst:.1e}, invariant to how a prompt is cut"

    return check


def _rows(dtype: torch.dtype) -> Callable[[], str]:
    def check() -> str:
        worst = 0.0
        for hidden in (4096, 576, 72) if torch.cuda.is_available() else (72,):
            residual, x, weight = (_random(*shape, dtype=dtype) for shape in ((5, hidden), (5, hidden), (hidden,)))
            twin, y, expected = residual.clone(), _nan(5, hidden, dtype=dtype), torch.empty_like(residual)
            twins.add_rms_norm(expected, twin, x, weight, 1e-5)
            add_rms_norm(y, residual, x, weight, 1e-5)
            worst = max(worst, _error(expected, y, dtype), _error(twin, residual, dtype))
            for kind in ("silu", "gelu_tanh"):
                both = _random(5, 2 * hidden, dtype=dtype)
                twins.gated_activation(expected, both, kind)
                gated_activation(y, both, kind)
                worst = max(worst, _error(expected, y, dtype))
        for head_dim, rotary_dim in ((128, 128), (128, 96), (72, 72)):
            worst = max(worst, _rotary(head_dim, rotary_dim, dtype))
        return f"RMS error {worst:.1e}"

    return check


def _rotary(head_dim: int, rotary_dim: int, dtype: torch.dtype) -> float:
    heads, kv_heads = 4, 2
    qkv = _random(3, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    pools = [_random(4, 2, kv_heads, head_dim, dtype=dtype) for _ in range(2)]
    positions, slots = torch.tensor([5, 0, 2], device=device()), torch.tensor([3, -1, 6], device=device())
    angles = torch.randn(8, rotary_dim // 2, device=device()).repeat(1, 2)
    results = []
    for rotate in (twins.rotate_and_store, rotate_and_store):
        own = q, k, v = [tensor.clone() for tensor in (qkv, *pools)]
        rotate(
            q, k, v, positions, slots, cos=angles.cos(), sin=angles.sin(), heads=heads, kv_heads=kv_heads,
            head_dim=head_dim, q_norm=None, k_norm=None, eps=1e-5,
        )  # fmt: skip
        results.append(own)
    return max(_error(expected, actual, dtype) for expected, actual in zip(*results, strict=True))


def _product(dtype: torch.dtype) -> Callable[[], str]:
    def check() -> str:
        in_features, out_features = (4096, 1088) if torch.cuda.is_available() else (72, 40)
        x, weight = _random(100, in_features, dtype=dtype), _random(out_features, in_features, dtype=dtype)
        results = []
        for tokens in (1, 16, 17, 100):
            out = _nan(tokens, out_features, dtype=dtype)
            linear(out, x[:tokens].contiguous(), weight)
            results.append(out)
        worst = _error((x.double() @ weight.double().t()), results[-1], dtype)
        if torch.cuda.is_available():  # numpy's rows depend on their matrix
            for out in results:
                assert torch.equal(out, results[-1][: len(out)]), f"bits of {len(out)} rows are not those of 100"
        return f"RMS error {worst:.1e}, a row's bits do not depend on their number"

    return check


def _lists() -> str:
    backend = TritonBackend(device())
    groups = [GroupTable(48, outs, 8, device()) for outs in ([48, 24, 24], [96])]
    for group in groups:
        for table in group.modules:
            for slot, layout in enumerate(LAYOUTS):
                entries = [Entry(a_offset=0, b_offset=0, r=r, k=k, scale=1.0) for r, k in layout]
                table.set(slot, entries)
    random = np.random.default_rng(0)
    for tokens in (1, 7, 40):
        grouping = _grouping(random.integers(-1, 8, tokens), LAYOUTS)
        backend.prepare(groups, grouping)
        wanted = plan_work(groups, grouping, BLOCKING)
        for group, work in zip(groups, wanted.groups, strict=True):
            for made, first, count in zip(
                backend.lists(group),
                (work.shrink_start, work.expand_start),
                (work.num_shrink_items, work.num_expand_items),
                strict=True,
            ):
                assert np.array_equal(made, wanted.items[first : first + count]), f"lists of {tokens} tokens differ"
    return "equal to plan_work's"


def _grouping(slots: np.ndarray, layouts: list[list[tuple[int, int]]]) -> Grouping:
    grouping = Grouping(len(slots))
    grouping.fill(slots.astype(np.int32), {slot: sum(r * k for r, k in one) for slot, one in enumerate(layouts)})
    return grouping


def _random(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, device=device()).to(dtype)


def _nan(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, torch.nan, dtype=dtype, device=device())


def _error(expected: Tensor, actual: Tensor, dtype: torch.dtype) -> float:
    error = float((actual.double() - expected.double()).norm() / expected.double().norm())
    assert error <= BOUNDS[dtype], f"RMS error {error:.2e} is more than {BOUNDS[dtype]:g}"
    return error
