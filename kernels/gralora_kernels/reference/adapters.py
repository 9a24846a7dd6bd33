"""The specification: every kernel must agree with these few lines of torch. Slow on purpose; knows no layout tricks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from gralora_kernels.alignment import map_numel
from gralora_kernels.grouping import Grouping
from gralora_kernels.packing import Packing
from gralora_kernels.tables import DTYPES, GroupTable, ModuleTable, Storage


def pack_a(a: Tensor) -> Tensor:
    """A [k, in/k, r] -> Ap [r, in], with Ap[p, n*in/k + i] = A[n, i, p]."""
    return a.permute(2, 0, 1).reshape(a.shape[2], -1).contiguous()


def unpack_a(packed: Tensor, k: int) -> Tensor:
    """Ap [r, in] -> A [k, in/k, r]."""
    return packed.view(packed.shape[0], k, -1).permute(1, 2, 0).contiguous()


def pack_b(b: Tensor) -> Tensor:
    """B [k, r, out/k] -> Bp [r, out], with Bp[c, j*out/k + o] = B[j, c, o]."""
    return b.permute(1, 0, 2).reshape(b.shape[1], -1).contiguous()


def unpack_b(packed: Tensor, k: int) -> Tensor:
    """Bp [r, out] -> B [k, r, out/k]."""
    return packed.view(packed.shape[0], k, -1).permute(1, 0, 2).contiguous()


def affine(y: Tensor, gains: Tensor, shifts: Tensor) -> Tensor:
    """y [t, out], with all that is added to it, as DoRA's magnitudes and biases change it."""
    return gains * y + shifts


def gralora(x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """x [t, in], A [k, in/k, r], B [k, r, out/k] -> the update [t, out]; k = 1 is plain LoRA."""
    k, _, r = a.shape
    u = torch.einsum("tni,nir->tnr", x.view(len(x), k, -1), a) * scale
    v = u.view(len(x), k, k, r // k).transpose(1, 2).reshape(len(x), k, r)  # v[t,j,n*s+c] = u[t,n,j*s+c]
    return torch.einsum("tjr,jro->tjo", v, b).reshape(len(x), -1)


class ReferenceBackend:
    """`gralora` per module, segment and entry, then `affine`, in fp32."""

    name = "reference"
    packing = Packing(keeps_16_bit=True)

    def prepare(self, groups: Sequence[GroupTable], grouping: Grouping) -> None:
        """Nothing is shared between layers."""

    def apply(self, y: Tensor, x: Tensor, arena: Tensor, group: GroupTable, grouping: Grouping) -> None:
        """y [tokens, sum(out)] += adapter(x [tokens, in]) for the tokens that have an adapter."""
        for table, start in zip(group.modules, group.column_starts, strict=True):
            self._apply_module(y[:, start : start + table.out_features], x, arena, table, grouping)

    def look_up(
        self, y: Tensor, ids: Tensor, arena: Tensor, group: GroupTable, grouping: Grouping, *, factor: float
    ) -> None:
        """See `AdapterBackend`."""
        (table,) = group.modules
        for slot, tokens in _segments(grouping, y.device):
            own_ids = ids[tokens].long()
            rows = y[tokens].float()
            if at := int(table.host_affine[slot]):
                row_of, own = _map_and_rows(arena, at - 1, table)
                found = row_of[own_ids].long()
                rows[found > 0] = factor * own[found[found > 0] - 1].float()
            for a_offset, b_offset, r, _k, scale, storage in _entries(table, slot):
                a = _matrix(arena, a_offset, r * table.in_features, storage).view(r, -1)
                b = _matrix(arena, b_offset, r * table.out_features, storage).view(r, -1)
                rows += factor * scale * (a[:, own_ids].T @ b)
            y[tokens] = rows.to(y.dtype)

    def _apply_module(self, y: Tensor, x: Tensor, arena: Tensor, table: ModuleTable, grouping: Grouping) -> None:
        for slot, tokens in _segments(grouping, y.device):
            for a_offset, b_offset, r, k, scale, storage in _entries(table, slot):
                packed_a = _matrix(arena, a_offset, r * table.in_features, storage).view(r, -1)
                packed_b = _matrix(arena, b_offset, r * table.out_features, storage).view(r, -1)
                update = gralora(x[tokens].float(), unpack_a(packed_a, k), unpack_b(packed_b, k), scale)
                y[tokens] = (y[tokens].float() + update).to(y.dtype)
            if at := int(table.host_affine[slot]):
                gains, shifts = _vectors(arena, at - 1, table.out_features)
                y[tokens] = affine(y[tokens].float(), gains, shifts).to(y.dtype)


def _segments(grouping: Grouping, device: torch.device) -> Iterator[tuple[int, Tensor]]:
    """Slots in use, and the tokens of each."""
    for segment, slot in enumerate(grouping.slots.tolist()):
        rows = grouping.order[grouping.starts[segment] : grouping.starts[segment + 1]]
        yield slot, torch.from_numpy(rows).to(device, torch.int64)


def _entries(table: ModuleTable, slot: int) -> Iterator[tuple[int, int, int, int, float, int]]:
    """(a_offset, b_offset, r, k, scale, storage) of each that a slot has."""
    rows = zip(table.host_index[slot].tolist(), table.host_scale[slot], table.host_storage[slot].tolist(), strict=True)
    for (a_offset, b_offset, r, k), scale, storage in rows:
        if r:
            yield a_offset, b_offset, r, k, float(scale), storage


def _map_and_rows(arena: Tensor, offset: int, embedding: ModuleTable) -> tuple[Tensor, Tensor]:
    """int32 [in], and rows [n, out] of the arena's elements, of which as many are valid as the map names."""
    start = offset + map_numel(embedding.in_features, arena.itemsize)
    row_of = arena[offset:start].view(torch.int32)[: embedding.in_features]
    numel = int(row_of.max()) * embedding.out_features
    return row_of, arena[start : start + numel].view(-1, embedding.out_features)


def _matrix(arena: Tensor, offset: int, numel: int, storage: int) -> Tensor:
    """`numel` elements from `offset` on, as fp32."""
    if storage != Storage.NATIVE:
        return arena[offset:].view(DTYPES[Storage(storage)])[:numel].float()
    return arena[offset : offset + numel].float()


def _vectors(arena: Tensor, offset: int, count: int) -> tuple[Tensor, Tensor]:
    """Gains and shifts [count], which are fp32 in any arena."""
    both = arena[offset:][: 2 * count * torch.float32.itemsize // arena.itemsize].view(torch.float32)
    return both[:count], both[count:]
