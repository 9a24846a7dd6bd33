"""What PEFT itself answers: the reference that the demo and the tests compare the server with."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from shutil import copytree

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

# Where PEFT's own best two logits are this close, rounding decides between them, and either token is right.
TIE_MARGIN = 1e-3


@dataclass(frozen=True, slots=True)
class GreedyAnswer:
    """Greedy tokens, and by how much each one's logit led the second best."""

    token_ids: tuple[int, ...]
    margins: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Comparison:
    """`flip_at`: where a tie within `TIE_MARGIN` went the other way; nothing after it can be compared."""

    equal: bool
    flip_at: int | None = None
    first_difference: int | None = None


def load_base(model_dir: Path) -> PreTrainedModel:
    """The base model in fp32, as transformers runs it."""
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, local_files_only=True).eval()


def greedy(base: PreTrainedModel, adapter_dir: Path | None, token_ids: Sequence[int], num_tokens: int) -> GreedyAnswer:
    """`num_tokens` greedy tokens after `token_ids`, past any end-of-sequence token. Leaves `base` as it was."""
    if adapter_dir is None:
        return _greedy(base, token_ids, num_tokens)
    with peft_readable(adapter_dir) as readable:
        adapted = PeftModel.from_pretrained(base, readable).eval()
        try:
            return _greedy(adapted, token_ids, num_tokens)
        finally:
            adapted.unload()


def compare(served: Sequence[int], expected: GreedyAnswer) -> Comparison:
    """Served tokens against PEFT's."""
    for position, (ours, theirs) in enumerate(zip(served, expected.token_ids, strict=False)):
        if ours != theirs:
            tie = expected.margins[position] <= TIE_MARGIN
            return Comparison(equal=tie, flip_at=position if tie else None, first_difference=position)
    return Comparison(equal=len(served) == len(expected.token_ids))


@torch.inference_mode()
def _greedy(model: torch.nn.Module, token_ids: Sequence[int], num_tokens: int) -> GreedyAnswer:
    tokens, margins = [], []
    ids, cache = torch.tensor([list(token_ids)]), None
    for _ in range(num_tokens):
        output = model(input_ids=ids, past_key_values=cache, use_cache=True)
        best = output.logits[0, -1].float().topk(2)
        tokens.append(int(best.indices[0]))
        margins.append(float(best.values[0] - best.values[1]))
        ids, cache = best.indices[:1][None], output.past_key_values
    return GreedyAnswer(tuple(tokens), tuple(margins))


@contextmanager
def peft_readable(adapter_dir: Path) -> Iterator[Path]:
    """PEFT cannot read the authors' configuration keys: give it a copy that says the same in its own."""
    config = json.loads((adapter_dir / "adapter_config.json").read_text())
    if "gralora_alpha" not in config:
        yield adapter_dir
        return
    config["alpha"] = config.pop("gralora_alpha")
    config["r"] -= config["hybrid_r"]  # theirs counts both parts, so that alpha / (r + hybrid_r) is alpha / r again
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(copytree(adapter_dir, Path(folder) / "adapter"))
        (copy / "adapter_config.json").write_text(json.dumps(config))
        yield copy
