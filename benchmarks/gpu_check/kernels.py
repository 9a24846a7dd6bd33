"""Every kernel on this device against its few lines of torch, on awkward shapes, in memory that was NaN before."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from benchmarks.gpu_check import Check
from benchmarks.gpu_check.clock import device, device_ms, kernel_us
from gralora_kernels.alignment import ALIGNMENT
from gralora_kernels.dispatch import resolve_backend
from gralora_kernels.grouping import Grouping
from gralora_kernels.reference import rows as twins
from gralora_kernels.reference import sampling as sampling_twin
from gralora_kernels.reference.adapters import ReferenceBackend
from gralora_kernels.reference.attention import attention_in_rows
from gralora_kernels.sampling_rules import Rules, SamplingRules, rule, with_biases
from gralora_kernels.tables import ARENA_SLACK, Entry, GroupTable
from gralora_kernels.triton_ops import attention_launch
from gralora_kernels.triton_ops.activation import activate
from gralora_kernels.triton_ops.adapters.launch import BLOCKING, TritonBackend
from gralora_kernels.triton_ops.attention_launch import AttentionShape, PagedAttention
from gralora_kernels.triton_ops.norm import add_norm, norm_rows
from gralora_kernels.triton_ops.product import linear
from gralora_kernels.triton_ops.rotary import rotate_and_store
from gralora_kernels.triton_ops.sampling_launch import RowSampler
from gralora_kernels.work import plan_work

BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}  # RMS error over RMS
Layout = list[tuple[int, int]]  # r and k of each entry
LAYOUTS: list[Layout] = [[(16, 2)], [(8, 8)], [(3, 1)], [(12, 4), (5, 1)], [(64, 8), (8, 1)], [(1, 1)], [(64, 1)], []]
EPS = 1e-5


@dataclass(frozen=True, slots=True)
class Heads:
    """Of an attention: any width, any number that share keys and values, any page."""

    head_dim: int
    heads: int
    kv_heads: int
    page_size: int

    def __str__(self) -> str:
        return f"heads {self.heads}/{self.kv_heads} of {self.head_dim}, pages of {self.page_size}"


WELL_KNOWN = [Heads(128, 32, 8, 16), Heads(80, 8, 2, 7)]
RARE = [Heads(64, 9, 3, 16), Heads(96, 12, 1, 32), Heads(256, 16, 8, 16), Heads(72, 7, 7, 1)]


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fresh memory is NaN in every float dtype, and no item of any list: who reads it cannot pass by luck."""
    empty = torch.empty

    def poisoned(*args: object, **kwargs: object) -> Tensor:
        tensor: Tensor = empty(*args, **kwargs)  # type: ignore[call-overload]
        if tensor.dim() and tensor.numel() and tensor.is_contiguous():
            tensor.view(torch.uint8).fill_(255)
        return tensor

    with patch.object(torch, "empty", poisoned):
        yield


def checks(dtype: torch.dtype) -> Iterator[Check]:
    """All of them in one dtype, by name."""
    on_gpu = torch.cuda.is_available()
    if not on_gpu and dtype != torch.float32:
        return  # the interpreter of a dry run rounds bf16 in its own way
    kind = str(dtype).removeprefix("torch.")
    for in_features, outs in _widths():
        yield f"adapters {kind} {in_features}->{outs}", partial(_adapters, in_features, outs, dtype)
    for heads in _heads(dtype):
        yield f"attention {kind} {heads}", partial(_attention, heads, dtype, (0, 300), 0.0)
    for heads in WELL_KNOWN if on_gpu else ():
        yield f"attention {kind} {heads}, soft cap and sinks", partial(_attention, heads, dtype, (0, 5), 30.0)
    yield f"norm, rotary, activation {kind}", partial(_rows, dtype)
    yield f"batch-invariant product {kind}", partial(_product, dtype)
    for vocab in (128256, 50257) if on_gpu else (257,):
        yield f"sampling {kind} of {vocab} against its twin", partial(_sampling, vocab, dtype)
    if dtype == torch.bfloat16:
        yield f"sampling {kind}, 128 rows of 128256: times", partial(_sampling_times, 128, 128256, dtype)
    if dtype == torch.float32:
        yield "lists made by the device", _lists


def _widths() -> list[tuple[int, list[int]]]:
    if torch.cuda.is_available():
        return [(4096, [4096, 1024, 1024]), (14336, [4096]), (576, [576, 192, 192]), (2504, [64, 24]), (40, [72, 72])]
    return [(64, [24, 24]), (2056, [24])]


def _heads(dtype: torch.dtype) -> list[Heads]:
    """Each is compiled several times, a second or more each, and fp16 is computed as bf16 is."""
    if not torch.cuda.is_available():
        return [Heads(32, 4, 2, 7)]
    return WELL_KNOWN if dtype == torch.float16 else WELL_KNOWN + RARE


class AdapterCase:
    """One group with an adapter of each layout in its slots, again and again up to 48 of them."""

    def __init__(self, in_features: int, outs: list[int], dtype: torch.dtype) -> None:
        self.layouts = [
            [(r, k) for r, k in layout if all(features % k == 0 for features in (in_features, *outs))]
            for layout in LAYOUTS * (6 if torch.cuda.is_available() else 1)
        ]
        self.group = GroupTable(in_features, outs, len(self.layouts), device())
        self.backend = resolve_backend("triton", device())
        size = 0
        for table in self.group.modules:
            for slot, layout in enumerate(self.layouts):
                entries = []
                for r, k in layout:
                    a_offset, size = size, size + -(-r * in_features // ALIGNMENT) * ALIGNMENT
                    b_offset, size = size, size + -(-r * table.out_features // ALIGNMENT) * ALIGNMENT
                    entries.append(Entry(a_offset=a_offset, b_offset=b_offset, r=r, k=k, scale=0.5))
                table.set(slot, entries)
        self.arena = _random(size + ARENA_SLACK, dtype=dtype) * 0.1

    def steps(self) -> dict[str, npt.NDArray[np.int64]]:
        """Slots of steps whose sums are shared out, are not, and are of many tokens an adapter."""
        random, slots = np.random.default_rng(0), len(self.layouts)
        if not torch.cuda.is_available():
            return {"split": np.array([4, -1, 3]), "full tiles": np.array([0] * 17 + [3])}
        return {
            "split": random.integers(-1, slots, 16),
            "whole": np.tile(np.arange(slots), 12),
            "full tiles": random.integers(-1, 5, 97),
        }

    def applied(self, y: Tensor, x: Tensor, slots: npt.NDArray[np.int64]) -> Tensor:
        """y and what the adapters add to it."""
        y, grouping = y.clone(), _grouping(slots, self.layouts)
        self.backend.prepare([self.group], grouping)
        self.backend.apply(y, x, self.arena, self.group, grouping)
        return y

    def expected(self, y: Tensor, x: Tensor, slots: npt.NDArray[np.int64]) -> Tensor:
        """By the twin, in fp32: rounding y + update to 16 bits may cost more than the update's own error."""
        y, grouping = y.to(torch.float32, copy=True), _grouping(slots, self.layouts)
        ReferenceBackend().apply(y, x.float(), self.arena.float(), self.group, grouping)
        return y


def _adapters(in_features: int, outs: list[int], dtype: torch.dtype) -> str:
    case, worst = AdapterCase(in_features, outs, dtype), 0.0
    for name, slots in case.steps().items():
        x, y = _random(len(slots), in_features, dtype=dtype), _random(len(slots), sum(outs), dtype=dtype) * 0.1
        together, expected = case.applied(y, x, slots), case.expected(y, x, slots)
        update = float((expected - y.float()).norm() / expected.norm())
        assert update > 10 * BOUNDS[dtype], f"{name}: adapters change {update:.1g} of y, this check could not fail"
        worst = max(worst, _error(expected, together, dtype))
        bare = torch.from_numpy(slots < 0).to(device())
        assert torch.equal(together[bare], y[bare]), f"{name}: rows without an adapter were changed"
        for token in {int(np.flatnonzero(slots >= 0)[place]) for place in (0, -1)}:
            one = slice(token, token + 1)
            alone = case.applied(y[one], x[one].clone(), slots[one])
            _assert_same(alone, together[one], f"{name}: token {token} depends on its batch")
    return f"RMS error {worst:.1e}; {BITS} of a token alone are those in its batch"


class AttentionCase:
    """Rows that decode and one of a prompt, over shuffled pages whose unused places hold NaN."""

    def __init__(self, sizes: Heads, dtype: torch.dtype) -> None:
        self.dtype, self.page_size = dtype, sizes.page_size
        self.contexts = [70, 1100, 33, 1, 20] if torch.cuda.is_available() else [20, 9]
        self.queries = [1] * (len(self.contexts) - 1) + [min(17, self.contexts[-1])]
        self.shape = AttentionShape(
            heads=sizes.heads, kv_heads=sizes.kv_heads, head_dim=sizes.head_dim, page_size=sizes.page_size,
            q_row=sizes.heads + 2 * sizes.kv_heads,
        )  # fmt: skip
        width = -(-max(self.contexts) // sizes.page_size)
        self.table = torch.randperm(len(self.contexts) * width).view(len(self.contexts), width).int()
        pool = (self.table.numel(), sizes.page_size, sizes.kv_heads, sizes.head_dim)
        self.keys, self.values = (self._pool(pool) for _ in range(2))
        self.q = _random(sum(self.queries), self.shape.q_row * sizes.head_dim, dtype=dtype)
        self.sinks = torch.linspace(-2, 4, sizes.heads, device=device()).to(dtype)  # beside a soft cap

    def _pool(self, shape: tuple[int, ...]) -> Tensor:
        pool = _nan(*shape, dtype=self.dtype)
        for row, length in enumerate(self.contexts):
            positions = torch.arange(length)
            pages = self.table[row, positions // self.page_size].long()
            pool[pages.to(device()), (positions % self.page_size).to(device())] = _random(
                length, *shape[2:], dtype=self.dtype
            )
        return pool

    def alone(self, attention: PagedAttention, row: int, token: int, window: int, cap: float) -> Tensor:
        """A row's last token as a step of its own."""
        return self._attended(attention, self.q[token : token + 1].clone(), {row: 1}, window, cap)

    def together(self, attention: PagedAttention, window: int, cap: float) -> Tensor:
        return self._attended(attention, self.q, dict(enumerate(self.queries)), window, cap)

    def _attended(
        self, attention: PagedAttention, q: Tensor, queries: dict[int, int], window: int, cap: float
    ) -> Tensor:
        """`queries`: by row, how many of its last tokens."""
        rows = list(queries)
        starts = np.cumsum([0, *queries.values()]).astype(np.int32)
        lengths = np.array([self.contexts[row] for row in rows], np.int32)
        attention.prepare(starts, lengths)
        out = _nan(len(q), self.shape.heads * self.shape.head_dim, dtype=self.dtype)
        attention.attend(
            out, q, self.keys, self.values, page_table=self.table[rows].to(device()),
            query_starts=torch.from_numpy(starts).to(device()), context_lens=torch.from_numpy(lengths).to(device()),
            scale=self.shape.head_dim**-0.5, window=window, softcap=cap, sinks=self.sinks if cap else None,
        )  # fmt: skip
        return out

    def expected(self, window: int, cap: float) -> Tensor:
        """By the twin, in fp32 on the host."""
        by_head = self.q.view(len(self.q), -1, self.shape.head_dim)[:, : self.shape.heads].float().cpu()
        out = torch.zeros_like(by_head)
        starts, lengths = torch.tensor([0, *np.cumsum(self.queries).tolist()]), torch.tensor(self.contexts)
        attention_in_rows(
            out, by_head, self.keys.float().cpu(), self.values.float().cpu(), self.table, starts, lengths,
            self.shape.head_dim**-0.5, window, cap, self.sinks.float().cpu() if cap else None,
        )  # fmt: skip
        return out.flatten(1)


def _attention(sizes: Heads, dtype: torch.dtype, windows: Sequence[int], cap: float) -> str:
    case, worst = AttentionCase(sizes, dtype), 0.0
    fast, invariant = (PagedAttention(case.shape, dtype, device(), invariant=value) for value in (False, True))
    for window in windows:
        expected = case.expected(window, cap)
        worst = max(worst, _error(expected, case.together(fast, window, cap).cpu(), dtype))
        together = case.together(invariant, window, cap)
        worst = max(worst, _error(expected, together.cpu(), dtype))
        for enough in (0, 1 << 20):  # no context is cut that need not be, each is
            with patch.object(attention_launch, "ENOUGH_PER_PROCESSOR", enough):
                cut = case.together(invariant, window, cap)
            _assert_same(cut, together, "bits depend on how a context is cut")
        ends = np.cumsum(case.queries).tolist()
        for row, end in enumerate(ends):  # the prompt's last token, too, as if it were a single one
            alone = case.alone(invariant, row, end - 1, window, cap)
            _assert_same(alone, together[end - 1 : end], f"row {row} depends on its batch or on how it was cut")
    return f"RMS error {worst:.1e}; {BITS} of a token alone are those in its batch"


def _rows(dtype: torch.dtype) -> str:
    widths = (4096, 576, 72) if torch.cuda.is_available() else (72,)
    worst = max(_norms(hidden, dtype, centres=centres) for hidden in widths for centres in (False, True))
    for width in (1536, 4100) if torch.cuda.is_available() else (72,):
        both = _random(5, 2 * width, dtype=dtype)
        for kind, gated in (("silu", True), ("gelu_tanh", True), ("squared_relu", False)):
            expected, out = (_nan(5, width, dtype=dtype) for _ in range(2))
            x = both if gated else both[:, :width].contiguous()
            twins.activate(expected, x, kind, gated=gated)
            activate(out, x, kind, gated=gated)
            worst = max(worst, _error(expected, out, dtype))
    for head_dim, rotary_dim, norms in ((128, 128, False), (128, 96, True), (72, 72, False)):
        for neighbours in (False, True):
            worst = max(worst, _rotary(head_dim, rotary_dim, dtype, norms=norms, neighbours=neighbours))
    return f"RMS error {worst:.1e}"


def _norms(hidden: int, dtype: torch.dtype, *, centres: bool) -> float:
    residual, x, weight = (_random(*shape, dtype=dtype) for shape in ((5, hidden), (5, hidden), (hidden,)))
    index = torch.tensor([4, 0], device=device())
    results = []
    for add, gather in ((twins.add_norm, twins.norm_rows), (add_norm, norm_rows)):
        last, own, y = _nan(2, hidden, dtype=dtype), residual.clone(), _nan(5, hidden, dtype=dtype)
        bias = weight.flip(0) if centres else None
        gather(last, own, index, x=x, weight=weight, eps=EPS, bias=bias, centres=centres)
        add(y, own, x, weight, EPS, bias=bias, centres=centres)
        results.append((last, own, y))
    return max(_error(expected, actual, dtype) for expected, actual in zip(*results, strict=True))


def _rotary(head_dim: int, rotary_dim: int, dtype: torch.dtype, *, norms: bool, neighbours: bool) -> float:
    heads, kv_heads = 4, 2
    qkv = _random(3, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    pools = [_random(4, 2, kv_heads, head_dim, dtype=dtype) for _ in range(2)]
    positions, slots = torch.tensor([5, 0, 2], device=device()), torch.tensor([3, -1, 6], device=device())
    angles = torch.randn(8, rotary_dim // 2, device=device()).repeat(1, 2)
    weights = [_random(head_dim, dtype=dtype) if norms else None for _ in range(2)]
    results = []
    for rotate in (twins.rotate_and_store, rotate_and_store):
        own = q, k, v = [tensor.clone() for tensor in (qkv, *pools)]
        rotate(
            q, k, v, positions, slots, cos=angles.cos(), sin=angles.sin(), heads=heads, kv_heads=kv_heads,
            head_dim=head_dim, q_norm=weights[0], k_norm=weights[1], eps=EPS, neighbours=neighbours,
        )  # fmt: skip
        results.append(own)
    return max(_error(expected, actual, dtype) for expected, actual in zip(*results, strict=True))


def _product(dtype: torch.dtype) -> str:
    in_features, out_features = (4096, 1088) if torch.cuda.is_available() else (72, 40)
    x, weight = _random(100, in_features, dtype=dtype), _random(out_features, in_features, dtype=dtype)
    bias, results = _random(out_features, dtype=dtype), []
    for tokens in (1, 16, 17, 100):
        out = _nan(tokens, out_features, dtype=dtype)
        linear(out, x[:tokens].contiguous(), weight, bias)
        results.append(out)
    worst = _error(x.double() @ weight.double().t() + bias.double(), results[-1], dtype)
    for out in results:
        _assert_same(out, results[-1][: len(out)], f"{len(out)} rows depend on their number")
    return f"RMS error {worst:.1e}; {BITS} of a row do not depend on how many there are"


PENALTIES: dict[str, Any] = {"repetition_penalty": 1.3, "frequency_penalty": 0.2, "presence_penalty": 0.5}
FILTERS: dict[str, Any] = {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "min_p": 0.02}
RULES: list[dict[str, Any]] = [
    {}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 40}, {"temperature": 2.0, "top_p": 0.9},
    {"temperature": 0.7, "min_p": 0.05}, FILTERS, PENALTIES, {**FILTERS, **PENALTIES},
    {"temperature": 30.0, "top_p": 0.5},
]  # fmt: skip
NUDGE = 1e-5  # of a random number: exponentials differ in their last bits


def _sampling(vocab: int, dtype: torch.dtype) -> str:
    """Rows of every kind side by side, on logits that are often equal."""
    count = 4 if torch.cuda.is_available() else 1
    rows = np.concatenate([rule(**one, num_top=i % 2 * 6 - 1) for i, one in enumerate(RULES * count)])
    random = np.random.default_rng(0)
    rows["uniform"], rows["history_slot"] = random.random(len(rows)), np.arange(len(rows))[::-1]
    biases = [{3: 5.0, vocab - 1: 6.0, 7: -np.inf} if i % 3 else {} for i in range(len(rows))]
    logits = _random(len(rows), vocab, dtype=torch.float32).mul(3).to(dtype)
    history = torch.randint(-9, 4, (len(rows), vocab), dtype=torch.int32, device=device()).clamp(min=0)
    before, sampler = history.clone().cpu(), RowSampler(vocab, len(rows), device())
    found = sampler.sample(logits, with_biases(rows, biases), history)
    tokens, differing = found.tokens.cpu(), 0
    low, middle, high = (_twins(logits, rows, biases, before, nudge) for nudge in (-NUDGE, 0, NUDGE))
    added = history.cpu() - before
    logprobs = torch.log_softmax(logits.cpu().double(), -1)
    for row, (token, expected) in enumerate(zip(tokens.tolist(), middle, strict=True)):
        assert low[row].token <= token <= high[row].token, f"row {row}: {token}, the twin's is {expected.token}"
        differing += token != expected.token
        ends = float(found.peaks[row]), float(found.bests[row])
        assert ends == (float(expected.peak), float(expected.best)), f"row {row}: largest logit and score {ends}"
        slot = int(rows["history_slot"][row])
        assert int(added[slot].sum()) == int(added[slot, token]) == 2, f"row {row}: history"
        if expected.logprob is not None:
            ids, values = zip(*expected.top, strict=True)
            assert list(ids) == found.top_ids[row, : len(ids)].tolist(), f"row {row}: the likeliest tokens"
            wanted = torch.tensor([*values, float(logprobs[row, token])])
            actual = torch.cat([found.top_logprobs[row, : len(ids)].cpu(), found.logprobs[row : row + 1].cpu()])
            torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-4)
    return f"{len(rows)} rows; {differing} tokens differ, within {NUDGE:g} of a boundary"


def _twins(
    logits: Tensor, rows: Rules, biases: list[dict[int, float]], history: Tensor, nudge: float
) -> list[sampling_twin.SampledRow]:
    rows = rows.copy()
    rows["uniform"] = np.clip(rows["uniform"] + nudge, 0, 1 - 2**-53)
    return sampling_twin.sample(logits, with_biases(rows, biases), history.clone())


def _sampling_times(rows: int, vocab: int, dtype: torch.dtype) -> str:
    """Microseconds of the device, beside those of reading logits, and histories where there are any, once. Other parts
    run meanwhile: all of it is slower than alone, the floor too."""
    logits = _random(rows, vocab, dtype=torch.float32).mul(3).to(dtype)
    history = torch.randint(-9, 4, (rows, vocab), dtype=torch.int32, device=device()).clamp(min=0)
    sampler, numbers = RowSampler(vocab, rows, device()), torch.zeros(1 << 28, device=device())
    read_us = 1e3 * device_ms(numbers.sum, 10) / numbers.nbytes
    found = []
    kinds = {"greedy": {}, "filters": FILTERS, "everything": {**FILTERS, **PENALTIES, "num_top": 5}}
    for name, one in kinds.items():
        rules = np.repeat(rule(**one), rows)
        rules["uniform"] = np.random.default_rng(0).random(rows)
        rules["history_slot"] = np.arange(rows) if name == "everything" else -1
        numel_bytes = logits.nbytes + (history.nbytes if name == "everything" else 0)
        work = partial(sampler.sample, logits, SamplingRules(rules), history)
        work()
        kernels = {kernel.split("_")[0]: us for kernel, (_, us) in kernel_us(work).items() if "_kernel" in kernel}
        parts = ", ".join(f"{kernel} {us:.0f}" for kernel, us in kernels.items())
        found.append(f"{name} {sum(kernels.values()):.0f} us (floor {read_us * numel_bytes:.0f}): {parts}")
    return "; ".join(found)


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


def _grouping(slots: npt.NDArray[np.int64], layouts: Sequence[Layout]) -> Grouping:
    grouping = Grouping(len(slots))
    grouping.fill(slots.astype(np.int32), {slot: sum(r * k for r, k in one) for slot, one in enumerate(layouts)})
    return grouping


def _random(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, device=device()).to(dtype)


def _nan(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, torch.nan, dtype=dtype, device=device())


# Rows of numpy's products, with which the interpreter computes, depend on their matrix.
BITS = "bits" if torch.cuda.is_available() else "values (bits: on a GPU only)"


def _assert_same(expected: Tensor, actual: Tensor, problem: str) -> None:
    if torch.cuda.is_available():
        assert torch.equal(expected, actual), problem
    else:
        torch.testing.assert_close(actual, expected, msg=problem)


def _error(expected: Tensor, actual: Tensor, dtype: torch.dtype) -> float:
    error = float((actual.double() - expected.double()).norm() / expected.double().norm())
    assert error <= BOUNDS[dtype], f"RMS error {error:.2e} is more than {BOUNDS[dtype]:g}"
    return error
