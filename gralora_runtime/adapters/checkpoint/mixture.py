"""Several adapters as one: the sum of their updates, each times a weight, exactly. Knows packed blobs, and no names.

Pairs of the same number of blocks k lie side by side in one: strip j of A[n] is that of the first and then that of the
second, and so are the rows of B[j]. Nothing is added up, so nothing is rounded but scales that have to be multiplied
into B, in float32, because pairs with different ones share an entry of the kernels' tables. Where pairs of more k meet
in a module than it has entries, the smaller ones become plain ones.

An adapter with gains g and shifts c adds (g - 1) * y + g * update + c to what a layer gives. So a sum's gains are
G = 1 + sum w * (g - 1) and its shifts sum w * c, and its updates are multiplied by w * g / G.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from itertools import accumulate, islice

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gralora_kernels.alignment import aligned
from gralora_kernels.packing import Array, Packing, blocks_a, blocks_b, place_a, place_b
from gralora_kernels.tables import DTYPES, ENTRIES, Entry, Storage
from gralora_runtime.adapters.checkpoint.header import AdapterSummary
from gralora_runtime.adapters.checkpoint.loader import AdapterLayout, LoadedAdapter
from gralora_runtime.adapters.checkpoint.plan import AFFINE_BYTES
from gralora_runtime.adapters.checkpoint.recipe import Affines, Layout
from gralora_runtime.adapters.checkpoint.spec import ModuleShape, rejected
from gralora_runtime.adapters.checkpoint.stored import held

LARGEST_FACTOR = 1e4  # what float32 has left of a number that is multiplied by it and then divided again
STORAGES = {dtype: storage for storage, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Ingredient:
    """One adapter of a sum."""

    adapter: LoadedAdapter
    weight: float  # that a float32 holds


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One pair of a module."""

    r: int
    k: int
    scale: float
    dtype: torch.dtype  # of its elements
    a: Array  # [k, in/k, r]; elements of 16 bits as bits
    b: Array  # [k, r, out/k]


def mixture_digest(ingredients: Iterable[tuple[str, float]]) -> str:
    """SHA-256 of what a sum computes, whatever its order: of each adapter's digest and the bits of its weight."""
    parts = sorted((digest, struct.pack(">f", weight).hex()) for digest, weight in ingredients)
    return hashlib.sha256(b"sum of adapters " + json.dumps(parts).encode()).hexdigest()


def mixed(
    name: str,
    ingredients: Sequence[Ingredient],
    modules: Sequence[ModuleShape],
    *,
    packing: Packing,
    max_width: int,
) -> LoadedAdapter:
    """The sum of adapters that were packed alike, or AdapterRejectedError. `name`: for the error."""
    # One order, so that one digest means one blob, to the last bit.
    ordered = sorted(ingredients, key=lambda one: (one.adapter.digest, struct.pack(">f", one.weight)))
    if problems := list(_problems(ordered, {module.name for module in modules if module.experts > 1})):
        raise rejected(name, problems)
    layouts = [dict(one.adapter.layout.modules) for one in ordered]
    of_modules = [
        (module, [(one, layout.get(module.name, ())) for one, layout in zip(ordered, layouts, strict=True)])
        for module in modules
    ]
    # Turning a pair into a plain one changes nothing of it.
    width = max(sum(entry.width for _, entries in own for entry in entries) for _, own in of_modules)
    if width > max_width:
        problem = f"the ranks r * k + hybrid_r of its adapters are {width} together, this server takes at most"
        raise rejected(name, [f"{problem} {max_width}"])
    dtype = ordered[0].adapter.blob.dtype
    affines = {module: affine for module in modules if (affine := _affine_of(module, ordered)) is not None}
    if problems := list(_vanishing(affines)):
        raise rejected(name, problems)
    found = [(module, _pairs_of(module, own, affines.get(module), packing)) for module, own in of_modules]
    pairs = [(module, own) for module, own in found if own]
    blob, layout, places = _packed(pairs, affines, dtype, packing)
    return LoadedAdapter(
        AdapterLayout(
            digest=mixture_digest((one.adapter.digest, one.weight) for one in ordered),
            numel=blob.numel(),
            width=width,
            modules=layout,
            summary=_summary(ordered, width=width, num_modules=len(layout), numel=blob.numel()),
            affines=places,
        ),
        blob,
    )


def _problems(ingredients: Sequence[Ingredient], stacks: AbstractSet[str]) -> Iterator[str]:
    for on_experts in (sorted(stacks & dict(one.adapter.layout.modules).keys()) for one in ingredients):
        if on_experts:
            yield f"one of its adapters is on experts ({on_experts[0]}), and PEFT adds up none of those either"
    for invocation in (one.adapter.layout.summary.invocation for one in ingredients):
        if invocation:
            yield f"one of its adapters begins at the tokens {list(invocation)} of a prompt: a sum has no such place"
    for more in (one.adapter.layout.summary.added_tokens for one in ingredients):
        if more:
            yield f"one of its adapters has {more} tokens more than the base model: those have no sum"
    for replaced in (one.adapter.layout.summary.replaces for one in ingredients):
        if replaced:
            yield f"one of its adapters has its own weights in the place of {replaced[0]}'s: those have no sum"


def _vanishing(affines: Mapping[ModuleShape, _Affine]) -> Iterator[str]:
    for module, affine in affines.items():
        if affine.vanishes:
            yield f"module {module.name}: with these weights some outputs all but vanish"


@dataclass(frozen=True, slots=True)
class _Affine:
    """One module's gains and shifts, and what each ingredient's updates are multiplied by beside its weight."""

    gains: Array  # fp32 [out]
    shifts: Array
    factors: Sequence[Array | None]  # None: 1

    @property
    def vanishes(self) -> bool:
        """Updates would have to be divided by next to nothing."""
        return any(factor is not None and not (np.abs(factor) < LARGEST_FACTOR).all() for factor in self.factors)


def _affine_of(module: ModuleShape, ingredients: Sequence[Ingredient]) -> _Affine | None:
    """None: no adapter has any."""
    found = [_gains_and_shifts(module, one.adapter) for one in ingredients]
    if all(affine is None for affine in found):
        return None
    total: Array = np.zeros((2, module.out_features))
    total[0] = 1.0
    for one, affine in zip(ingredients, found, strict=True):
        if affine is not None:
            total += one.weight * (affine - [[1.0], [0.0]])
    gains = total[0]
    if (gains == 1).all():  # biases alone
        factors: list[Array | None] = [None] * len(found)
    else:
        with np.errstate(divide="ignore", invalid="ignore"):
            factors = [(1.0 if affine is None else affine[0]) / gains for affine in found]
    return _Affine(gains.astype(np.float32), total[1].astype(np.float32), factors)


def _gains_and_shifts(module: ModuleShape, adapter: LoadedAdapter) -> Array | None:
    """float64 [2, out]."""
    for name, offset in adapter.layout.affines:
        if name == module.name:
            cells: Array = adapter.blob[offset:].view(torch.uint8).numpy()[: AFFINE_BYTES * module.out_features]
            return cells.view(np.float32).reshape(2, -1).astype(np.float64)
    return None


def _pairs_of(
    module: ModuleShape, own: Sequence[tuple[Ingredient, Sequence[Entry]]], affine: _Affine | None, packing: Packing
) -> Sequence[Pair]:
    """All that one module's matrices compute for a sum."""
    factors = [None] * len(own) if affine is None else affine.factors
    return fitted(
        [
            _with_columns_of_b(_pair(module, entry, one, packing), factor)
            for (one, entries), factor in zip(own, factors, strict=True)
            for entry in entries
        ]
    )


def _with_columns_of_b(pair: Pair, factor: Array | None) -> Pair:
    """Each output's multiplied by a number of its own, [out]; None: by 1."""
    if factor is None:
        return pair
    a, b = (_widened(elements, pair.dtype) for elements in (pair.a, pair.b))
    columns = factor.astype(np.float32).reshape(pair.k, 1, -1)
    return replace(pair, dtype=torch.float32, a=a, b=b * columns)


def _pair(module: ModuleShape, entry: Entry, of: Ingredient, packing: Packing) -> Pair:
    blob = of.adapter.blob
    dtype = DTYPES.get(entry.storage, blob.dtype)

    def elements(offset: int, features: int) -> Array:
        cells: Array = blob[offset:].view(torch.uint8).numpy()
        return cells[: entry.r * features * dtype.itemsize].view(_array_dtype(dtype))

    return Pair(
        r=entry.r,
        k=entry.k,
        scale=entry.scale * of.weight,
        dtype=dtype,
        a=blocks_a(elements(entry.a_offset, module.in_features), entry.k, entry.r, packing.panel),
        b=blocks_b(elements(entry.b_offset, module.out_features), entry.k, entry.r, packing.panel),
    )


def fitted(pairs: Sequence[Pair]) -> Sequence[Pair]:
    """At most as many as a module has entries, which compute the same sum; as they are where that is few enough."""
    if len(pairs) > ENTRIES:
        pairs = _joined_by(lambda pair: (pair.k, pair.scale, pair.dtype), pairs)
    if len(pairs) > ENTRIES:
        pairs = _joined_by(lambda pair: pair.k, pairs)
    if len(pairs) > ENTRIES:  # the ranks that a plain pair needs more are r * (k - 1)
        by_price = sorted(pairs, key=lambda pair: pair.r * (pair.k - 1), reverse=True)
        kept, others = by_price[: ENTRIES - 1], by_price[ENTRIES - 1 :]
        pairs = [*kept, _joined([_plain(pair) for pair in others])]
    return pairs


def _joined_by(key: Callable[[Pair], Hashable], pairs: Sequence[Pair]) -> list[Pair]:
    alike: defaultdict[Hashable, list[Pair]] = defaultdict(list)
    for pair in pairs:
        alike[key(pair)].append(pair)
    return [_joined(group) for group in alike.values()]


def _joined(pairs: Sequence[Pair]) -> Pair:
    """Pairs of one k as one, side by side."""
    if len(pairs) == 1:
        return pairs[0]
    if len({(pair.scale, pair.dtype) for pair in pairs}) > 1:
        pairs = [_with_scale_in_b(pair) for pair in pairs]
    k, r = pairs[0].k, sum(pair.r for pair in pairs)
    a = np.concatenate([pair.a.reshape(k, -1, k, pair.r // k) for pair in pairs], axis=3)  # [k, in/k, k, s]
    b = np.concatenate([pair.b.reshape(k, k, pair.r // k, -1) for pair in pairs], axis=2)  # [k, k, s, out/k]
    return replace(pairs[0], r=r, a=a.reshape(k, -1, r), b=b.reshape(k, r, -1))


def _with_scale_in_b(pair: Pair) -> Pair:
    a, b = (_widened(elements, pair.dtype) for elements in (pair.a, pair.b))
    return replace(pair, scale=1.0, dtype=torch.float32, a=a, b=b * np.float32(pair.scale))


def _plain(pair: Pair) -> Pair:
    """The same with k = 1: row j*r + n*s + c carries inputs n to outputs j. Only places change; zeros are elsewhere."""
    if pair.k == 1:
        return pair
    return replace(pair, k=1, r=pair.k * pair.r, a=plain_a(pair.a), b=plain_b(pair.b))


def plain_a(a: Array) -> Array:
    """A [k, in/k, r] as that of a plain pair, [1, in, k*r]."""
    k, width, r = a.shape
    plain: Array = np.zeros((k, width, k, k, r // k), a.dtype)  # [inputs n, i, j, n, c]
    for n in range(k):
        plain[n, :, :, n] = a[n].reshape(width, k, r // k)
    return plain.reshape(1, k * width, k * r)


def plain_b(b: Array) -> Array:
    """B [k, r, out/k] as that of a plain pair, [1, k*r, out]."""
    k, r, width = b.shape
    plain: Array = np.zeros((k, r, k, width), b.dtype)  # [j, n*s + c, outputs j, o]
    for j in range(k):
        plain[j, :, j] = b[j]
    return plain.reshape(1, k * r, k * width)


def _widened(elements: Array, dtype: torch.dtype) -> Array:
    """Exactly."""
    if dtype == torch.float32:
        return elements
    if dtype == torch.float16:
        return elements.view(np.float16).astype(np.float32)
    return (elements.astype(np.uint32) << 16).view(np.float32)


def _packed(
    modules: Sequence[tuple[ModuleShape, Sequence[Pair]]],
    affines: Mapping[ModuleShape, _Affine],
    dtype: torch.dtype,
    packing: Packing,
) -> tuple[Tensor, Layout, Affines]:
    """A blob of `dtype`, first all A, then all B, then gains and shifts, as `Recipe` has it."""
    pairs = [_storable(pair, dtype, packing) for _, own in modules for pair in own]
    a_starts = list(accumulate((_numel(pair.a, dtype) for pair in pairs), initial=0))
    b_starts = list(accumulate((_numel(pair.b, dtype) for pair in pairs), initial=a_starts[-1]))
    vectors = [np.concatenate([affine.gains, affine.shifts]) for affine in affines.values()]
    starts = list(accumulate((_numel(vector, dtype) for vector in vectors), initial=b_starts[-1]))
    cells: Array = np.zeros(starts[-1], _array_dtype(dtype))
    for vector, offset in zip(vectors, starts[:-1], strict=True):
        cells[offset:].view(np.uint8)[: vector.nbytes] = vector.view(np.uint8)
    entries = []
    for pair, a_offset, b_offset in zip(pairs, a_starts[:-1], b_starts[:-1], strict=True):
        place_a(_room(cells, a_offset, pair.a), pair.a, packing.panel)
        place_b(_room(cells, b_offset, pair.b), pair.b, packing.panel)
        storage = Storage.NATIVE if pair.dtype == dtype else STORAGES[pair.dtype]
        entries.append(
            Entry(a_offset=a_offset, b_offset=b_offset, r=pair.r, k=pair.k, scale=pair.scale, storage=storage)
        )
    in_order = iter(entries)
    layout = tuple((module.name, tuple(islice(in_order, len(own)))) for module, own in modules)
    places = tuple((module.name, offset) for module, offset in zip(affines, starts[:-1], strict=True))
    return torch.from_numpy(cells).view(dtype), layout, places


def _storable(pair: Pair, dtype: torch.dtype, packing: Packing) -> Pair:
    """What was multiplied is rounded where a pool of 16 bits has to hold it."""
    if pair.dtype == dtype or (packing.keeps_16_bit and pair.dtype in STORAGES):
        return pair
    a, b = (held(each.reshape(-1), "F32", dtype).reshape(each.shape) for each in (pair.a, pair.b))
    return replace(pair, dtype=dtype, a=a, b=b)


def _numel(elements: Array, dtype: torch.dtype) -> int:
    """Cells of a blob of `dtype` that they take."""
    return aligned(-(-elements.nbytes // dtype.itemsize))


def _room(cells: Array, offset: int, elements: Array) -> Array:
    return cells[offset:].view(elements.dtype)[: elements.size]


def _array_dtype(dtype: torch.dtype) -> npt.DTypeLike:
    """How numpy holds elements: 16 bits as bits."""
    return np.float32 if dtype == torch.float32 else np.uint16


def _summary(ingredients: Sequence[Ingredient], *, width: int, num_modules: int, numel: int) -> AdapterSummary:
    """In the words of its first adapter, where a sum has none of its own."""
    summaries = [one.adapter.layout.summary for one in ingredients]
    return replace(
        summaries[0],
        rank=sum(summary.rank for summary in summaries),
        blocks=max(summary.blocks for summary in summaries),
        hybrid_rank=sum(summary.hybrid_rank for summary in summaries),
        equivalent_rank=width,
        num_modules=num_modules,
        tensor_bytes=sum(summary.tensor_bytes for summary in summaries),
        packed_numel=numel,
        notes=(),
    )
