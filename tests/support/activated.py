"""PEFT's model with an adapter, activated ones included: its own aLoRA, and its GraLoRA with our key worked by hand."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from shutil import copytree

import torch
from peft import PeftModel
from peft.tuners.gralora.layer import GraloraLayer
from peft_oracle import peft_readable
from torch import Tensor, nn
from transformers import PreTrainedModel

KEY = "alora_invocation_tokens"


@contextmanager
def adapted(base: PreTrainedModel, folder: Path, prompt: Sequence[int]) -> Iterator[PeftModel]:
    """For texts that begin with `prompt`, all of whose tokens are given to it at once."""
    config = json.loads((folder / "adapter_config.json").read_text())
    invocation = config.pop(KEY, None)
    if config["peft_type"] == "LORA" or not invocation:
        with peft_readable(folder) as readable:
            yield PeftModel.from_pretrained(base, readable).eval()
        return
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(copytree(folder, Path(scratch) / "adapter"))
        (copy / "adapter_config.json").write_text(json.dumps(config))
        with peft_readable(copy) as readable:
            model = PeftModel.from_pretrained(base, readable).eval()
    for layer in model.modules():
        if isinstance(layer, GraloraLayer):
            layer.register_forward_hook(_AddsFrom(last_place(invocation, prompt)))
    yield model


def last_place(invocation: Sequence[int], prompt: Sequence[int]) -> int | None:
    """Found in the simplest way that there is."""
    ends = range(len(prompt) - len(invocation), -1, -1)
    return next((at for at in ends if list(prompt[at : at + len(invocation)]) == list(invocation)), None)


class _AddsFrom:
    """A layer's output before `place` is its base layer's; None: all of it."""

    def __init__(self, place: int | None) -> None:
        self._place = place

    def __call__(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        unadapted: Tensor = layer.base_layer(*inputs)
        if self._place is None:
            return unadapted
        return torch.cat([unadapted[:, : self._place], output[:, self._place :]], dim=1)
