"""How two adapters differ: in what they are made of, and module by module in what they add to a weight."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from gralora_runtime.adapters.checkpoint.plan import Vector
from gralora_runtime.adapters.checkpoint.update import Update, minus, norm
from gralora_runtime.adapters.checkpoint.whole import WholeAdapter

Fact = str | int | float | list[str] | list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleDifference:
    """Frobenius norms of what A adds to a module, of what B adds (0: nothing), and of the difference of the two."""

    module: str
    norm_a: float
    norm_b: float
    difference: float | None  # None: the module is not as wide in A as in B, so there is nothing to subtract

    @property
    def relative(self) -> float | None:
        """The difference in parts of the larger norm: 0 if both add the same, 1 if one of them adds nothing."""
        if self.difference is None:
            return None
        largest = max(self.norm_a, self.norm_b)
        return self.difference / largest if largest else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """`digest_a` and `digest_b` are equal if, and only if, the adapters have the same content."""

    digest_a: str
    digest_b: str
    facts: Mapping[str, tuple[Fact, Fact]]  # of A and of B, where they differ
    modules: tuple[ModuleDifference, ...]  # the largest relative difference first

    @property
    def equal(self) -> bool:
        return self.digest_a == self.digest_b


def difference(a: WholeAdapter, b: WholeAdapter) -> Difference:
    """A and B were read for the same modules, or both without any."""
    facts_a, facts_b = _facts(a), _facts(b)
    modules = sorted(_modules(a.updates(), b.updates()), key=_most_different_first)
    return Difference(
        digest_a=a.digest,
        digest_b=b.digest,
        facts={key: (fact, facts_b[key]) for key, fact in facts_a.items() if fact != facts_b[key]},
        modules=tuple(modules),
    )


def _facts(adapter: WholeAdapter) -> dict[str, Fact]:
    summary = adapter.header.summary([module.module for module in adapter.plan])
    return {
        "dialect": str(summary.dialect),
        "r": summary.rank,
        "k": summary.blocks,
        "hybrid_r": summary.hybrid_rank,
        "scale": summary.scale,
        "base_model": summary.base_model,
        "invocation": list(summary.invocation),
        "dtypes": sorted({tensor.dtype for tensor in adapter.header.tensors.values()}),
        "targets": list(adapter.header.targets),
        "vectors": [f"{kind} {_digest(adapter, _vectors(adapter, kind))}" for kind in adapter.vectors],
        "rows": [f"{one.module.name} {_digest(adapter, [one.rows.name])}" for one in adapter.plan if one.rows],
    }


def _vectors(adapter: WholeAdapter, kind: Vector) -> list[str]:
    """The names of all of a kind."""
    return [vector.name for one in adapter.plan for vector in one.vectors if vector.kind is kind]


def _digest(adapter: WholeAdapter, names: Sequence[str]) -> str:
    """Short, of these tensors."""
    digest = hashlib.sha256()
    for name in names:
        digest.update(adapter.tensors[name].float().numpy().tobytes())
    return digest.hexdigest()[:12]


def _modules(a: Mapping[str, Update], b: Mapping[str, Update]) -> Iterator[ModuleDifference]:
    for module in sorted(a.keys() | b.keys()):
        of_a, of_b = a.get(module, ()), b.get(module, ())
        yield ModuleDifference(module=module, norm_a=norm(of_a), norm_b=norm(of_b), difference=_distance(of_a, of_b))


def _distance(a: Update, b: Update) -> float | None:
    if len({pair.shape for pair in (*a, *b)}) > 1:
        return None
    return norm((*a, *minus(b)))


def _most_different_first(found: ModuleDifference) -> tuple[bool, float, str]:
    return found.relative is not None, -(found.relative or 0.0), found.module
