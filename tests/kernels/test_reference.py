"""The reference is PEFT's mathematics; everything else is held against the reference."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from peft.tuners.gralora.config import GraloraConfig
from peft.tuners.gralora.layer import Linear as PeftGralora
from peft.tuners.lora.layer import Linear as PeftLora
from support.kernel_cases import CPU, Case
from support.numeric import assert_close
from torch import nn

from gralora_kernels.reference.adapters import ReferenceBackend, gralora, pack_a, pack_b, unpack_a, unpack_b
from gralora_kernels.tables import Entry, ModuleTable

RANKS_AND_KS = [(r, k) for r in (1, 2, 3, 8, 12, 64) for k in (1, 2, 4, 8) if r % k == 0]


def peft_gralora(in_features, out_features, r, k, hybrid_r):
    config = GraloraConfig(r=r, alpha=3, gralora_k=k, hybrid_r=hybrid_r, init_weights=False)
    base = nn.Linear(in_features, out_features, bias=False)
    return PeftGralora(base, "default", "q_proj", config, r)


@pytest.mark.parametrize(("r", "k"), RANKS_AND_KS)
@pytest.mark.parametrize("hybrid_r", [0, 5])
@pytest.mark.parametrize(("in_features", "out_features"), [(576, 1536), (192, 72 * 8)])
def test_reference_computes_what_peft_computes(in_features, out_features, r, k, hybrid_r):
    torch.manual_seed(r * 10 + k)
    layer = peft_gralora(in_features, out_features, r, k, hybrid_r)
    matrices = [pack_a(layer.gralora_A["default"].detach()), pack_b(layer.gralora_B["default"].detach())]
    layouts = [(r, k)]
    if hybrid_r:
        matrices += [
            layer.gralora_A_general["default"].weight.detach(),
            layer.gralora_B_general["default"].weight.detach().T.contiguous(),
        ]
        layouts.append((hybrid_r, 1))
    case = packed_case(in_features, out_features, matrices, layouts, 3 / (r + hybrid_r))
    x, y, grouping = case.step([-1, 0, 0])

    with torch.no_grad():
        expected = y + layer(x[None])[0] - layer.get_base_layer()(x)
    actual = case.apply(ReferenceBackend(), x, y, grouping)

    assert torch.equal(y[0], actual[0])
    assert_close(expected[1:] - y[1:], actual[1:] - y[1:])


def test_k_1_is_peft_lora():
    torch.manual_seed(0)
    config = LoraConfig(r=12, lora_alpha=7, init_lora_weights=False)
    layer = PeftLora(nn.Linear(576, 192, bias=False), "default", config=config, r=12, lora_alpha=7)
    a, b = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
    case = packed_case(576, 192, [a, b.T.contiguous()], [(12, 1)], 7 / 12)
    x, y, grouping = case.step([0] * 7)

    with torch.no_grad():
        expected = layer(x) - layer.get_base_layer()(x)

    assert_close(expected, case.apply(ReferenceBackend(), x, y, grouping) - y)


def test_update_equals_the_exact_lora_of_rank_k_r():
    a, b = torch.randn(4, 18, 12), torch.randn(4, 12, 24)
    x = torch.randn(5, 72)

    delta = gralora(torch.eye(72), a, b, 0.5)  # [in, out]

    assert torch.linalg.matrix_rank(delta) > 12
    assert_close(x @ delta, gralora(x, a, b, 0.5))


def test_unpacking_undoes_packing():
    a, b = torch.randn(4, 18, 12), torch.randn(4, 12, 24)

    assert torch.equal(a, unpack_a(pack_a(a), 4))
    assert torch.equal(b, unpack_b(pack_b(b), 4))


def packed_case(in_features, out_features, matrices, layouts, scale):
    """One adapter in slot 0; every size here is a multiple of 16 elements."""
    table = ModuleTable(in_features, out_features, 1, CPU)
    sizes = [matrix.numel() for matrix in matrices]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    table.set(0, [
        Entry(a_offset=starts[2 * i], b_offset=starts[2 * i + 1], r=r, k=k, scale=scale)
        for i, (r, k) in enumerate(layouts)
    ])  # fmt: skip
    return Case(table.group, torch.cat([matrix.reshape(-1) for matrix in matrices]))
