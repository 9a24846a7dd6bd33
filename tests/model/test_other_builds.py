"""Models of other builds than Llama's: transformers' own forward pass, with PEFT's logits all the same."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.served import check_against_peft, serving
from support.tiny_models import OTHER_BUILDS

from gralora_runtime.model.programs.transformers.runner import TransformersRunner

CHUNK = 9  # two chunks and a rest


@pytest.mark.parametrize("architecture", OTHER_BUILDS)
def test_all_adapters_in_one_batch_have_pefts_logits(architecture: str, tmp_path: Path) -> None:
    with serving(architecture, tmp_path / "model", tmp_path / "adapters") as served:
        assert isinstance(served.parts.runner, TransformersRunner)
        check_against_peft(served, CHUNK)
