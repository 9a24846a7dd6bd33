"""However an adapter is packed, its checkpoint's matrices come out again, bit by bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.checkpoints import MODULES, edit_tensors, write_gralora, write_lora

from gralora_kernels.packing import Packing
from gralora_runtime.adapters.checkpoint.loader import load
from gralora_runtime.adapters.checkpoint.unpacking import updates_in
from gralora_runtime.adapters.checkpoint.whole import read_whole

PACKINGS = [Packing(panel=panel, keeps_16_bit=keeps) for panel in (0, 3, 4, 16, 64) for keeps in (False, True)]


@pytest.mark.parametrize("packing", PACKINGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["lora", "k = 1", "k = 4 and hybrid"])
def test_matrices_come_out_as_they_were(kind: str, dtype: torch.dtype, packing: Packing, tmp_path: Path) -> None:
    def convert(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()})

    k, hybrid_r = (4, 3) if "hybrid" in kind else (1, 0)
    made = write_lora(tmp_path, r=5) if kind == "lora" else write_gralora(tmp_path, r=8, k=k, hybrid_r=hybrid_r)
    whole = read_whole(edit_tensors(made, convert), MODULES)

    found = updates_in(load("a", made, MODULES, torch.float32, max_width=64, packing=packing), MODULES, packing)

    assert found.keys() == whole.updates().keys()
    for module, update in whole.updates().items():
        for mine, stored in zip(found[module], update, strict=True):
            assert mine.scale == stored.scale
            assert mine.a.dtype == (dtype if packing.keeps_16_bit else torch.float32)
            assert torch.equal(mine.a, stored.a.to(mine.a.dtype))
            assert torch.equal(mine.b, stored.b.to(mine.b.dtype))
