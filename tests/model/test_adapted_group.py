"""Projections that share a product: found by name, computed once, and never given what is not their own."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from gralora_kernels.tables import GroupTable
from gralora_runtime.adapters.checkpoint.spec import ModuleShape
from gralora_runtime.adapters.residency.shared_inputs import group_siblings
from gralora_runtime.model.adaptable import joined_weight_and_bias
from gralora_runtime.model.programs.transformers.adapted_linear import AdaptedGroup, AdaptedLinear, DenseLinear
from gralora_runtime.model.programs.transformers.context import StepContext


class Counted(DenseLinear):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


def layers(context):
    linears = [nn.Linear(8, out, bias=out > 4) for out in (8, 4, 4)]
    base = Counted(*joined_weight_and_bias(linears))
    table = GroupTable(8, [8, 4, 4], 1, torch.device("cpu"))
    group = AdaptedGroup(base, table=table, arena=torch.zeros(1), backend=None, context=context)
    return linears, base, group, [AdaptedLinear(group, member) for member in range(3)]


def step():
    return SimpleNamespace(grouping=SimpleNamespace(num_adapted=0, num_tokens=3))


def test_siblings_share_one_product_and_get_their_own_columns():
    context = StepContext()
    linears, base, group, members = layers(context)
    x = torch.randn(1, 3, 8)

    with torch.inference_mode(), context.running(step(), None):
        outputs = [member(x) for member in members]

    assert base.calls == 1
    for linear, output in zip(linears, outputs, strict=True):
        torch.testing.assert_close(linear(x), output)
    assert group._input is None, "the input outlives its last use"


def test_another_input_is_never_answered_with_what_is_kept():
    context = StepContext()
    linears, base, _, (first, second, _) = layers(context)
    x, other = torch.randn(1, 3, 8), torch.randn(1, 3, 8)

    with torch.inference_mode(), context.running(step(), None):
        first(x)
        torch.testing.assert_close(linears[1](other), second(other))

    assert base.calls == 2


def test_a_part_is_handed_out_once_and_in_its_own_step():
    """The same tensor object may hold something else by the next call, and another step has other adapters."""
    context = StepContext()
    linears, _, _, (first, second, _) = layers(context)
    x = torch.randn(1, 3, 8)

    with torch.inference_mode():
        with context.running(step(), None):
            first(x)
            x += 1
            torch.testing.assert_close(linears[0](x), first(x))
            x += 1
        with context.running(step(), None):
            torch.testing.assert_close(linears[1](x), second(x))


def test_groups_are_found_by_parent_name_and_input_size():
    names = {
        "a.q_proj": 8,
        "a.k_proj": 8,
        "b.q_proj": 8,
        "a.v_proj": 8,
        "a.o_proj": 8,
        "m.up_proj": 8,
        "m.gate_proj": 8,
    }
    names |= {"c.q_proj": 8, "c.k_proj": 4, "q_proj": 8}

    groups = group_siblings([ModuleShape(name, size, 8) for name, size in names.items()])

    assert [[module.name for module in group] for group in groups] == [
        ["a.q_proj", "a.k_proj", "a.v_proj"], ["b.q_proj"], ["a.o_proj"], ["m.gate_proj", "m.up_proj"],
        ["c.q_proj"], ["c.k_proj"], ["q_proj"],
    ]  # fmt: skip
