"""Linear layers as served: the base product, plus what each token's adapter adds. Knows no adapter by name."""

from __future__ import annotations

from torch import Tensor, nn

from gralora_kernels.cpu.linear import PackedWeight, linear
from gralora_kernels.dispatch import AdapterBackend
from gralora_kernels.tables import GroupTable
from gralora_runtime.model.programs.transformers.context import StepContext
from gralora_runtime.stepping.batch import StepTensors


class PackedLinear(nn.Module):
    """fp32 linear on the CPU."""

    def __init__(self, weight: Tensor, bias: Tensor | None, *, least_bits: int) -> None:
        """`least_bits`: see `PackedWeight`."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = PackedWeight(weight, least_bits=least_bits)
        self._bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        out = x.new_empty(*x.shape[:-1], self.out_features)
        linear(out, x.contiguous(), self.weight, self._bias)
        return out


class DenseLinear(nn.Module):
    """Any other linear whose weight we hold ourselves."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = weight
        self._bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        return nn.functional.linear(x, self.weight, self._bias)


class AdaptedGroup(nn.Module):
    """Linear layers that read the same input, as one product and one call of the adapter kernels."""

    def __init__(
        self, base: nn.Module, *, table: GroupTable, arena: Tensor, backend: AdapterBackend, context: StepContext
    ) -> None:
        super().__init__()
        self.base = base
        self._table = table
        self._arena = arena
        self._backend = backend
        self._context = context
        # What one member's call computed for its siblings: in which step, from which input, and their parts.
        self._step: StepTensors | None = None
        self._input: Tensor | None = None
        self._parts: dict[int, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        """x [1, tokens, in] -> [1, tokens, sum(out)], or both without the 1; rows without an adapter are the base
        product, bit for bit."""
        y: Tensor = self.base(x)
        grouping = self._context.tensors.grouping
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        if len(rows) != grouping.num_tokens:  # then nobody knows whose they are: at start, such a model is refused
            raise ValueError(f"a linear layer reads {len(rows)} rows in a step of {grouping.num_tokens} tokens")
        if grouping.num_adapted:
            self._backend.apply(y.view(len(rows), -1), rows, self._arena, self._table, grouping)
        return y

    def part(self, member: int, x: Tensor) -> Tensor:
        """One member's columns of `forward(x)`. Each part is handed out once, and only for the tensor and the step that
        it was computed from: anything else is computed anew, so that no layer can be given what is not its own."""
        kept = self._input is x and self._step is self._context.tensors and member in self._parts
        if not kept:
            sizes = [table.out_features for table in self._table.modules]
            self._parts = dict(enumerate(self(x).split(sizes, dim=-1)))
            self._input, self._step = x, self._context.tensors
        part = self._parts.pop(member)
        if not self._parts:
            self._input = self._step = None
        return part


class AdaptedLinear(nn.Module):
    """A base linear that adapters may target: a member of a group, often its only one."""

    def __init__(self, group: AdaptedGroup, member: int) -> None:
        super().__init__()
        self.group = group
        self.member = member

    def forward(self, x: Tensor) -> Tensor:
        """x [1, tokens, in] -> [1, tokens, out]."""
        return self.group.part(self.member, x)


class AdaptedHead(nn.Module):
    """The output head, which is given the rows that want logits."""

    def __init__(self, base: nn.Module, context: StepContext) -> None:
        super().__init__()
        self.base = base
        self._context = context

    def forward(self, x: Tensor) -> Tensor:
        """x [1, rows, hidden] -> [1, rows, vocab], or wider: see `ApartStep.logits`."""
        logits: Tensor = self.base(x)
        return self._context.apart.logits(logits[0], x[0])[None]
