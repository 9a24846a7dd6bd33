"""Turns a GGUF checkpoint into a directory of safetensors weights, config and tokenizer, with transformers' own reader.

Knows nothing of caches or of which model it is. Run as a module (so that its memory is returned when it ends), it reads
one JSON job from standard input and prints one JSON progress line per stage or tensor.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import transformers.modeling_gguf_pytorch_utils as gguf_reader
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

Report = Callable[[str, int, int | None], None]  # stage, done, total


def convert_gguf(gguf: Path, target: Path, report: Report) -> None:
    """Write `target` so that `from_pretrained(target)` loads it in float32 with no trace of the quantised origin."""
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    report("Reading the tokenizer", 0, None)
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    report("Dequantizing the weights", 0, None)
    model = _load_reporting(source, report)
    report("Writing safetensors", 0, None)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _load_reporting(source: dict[str, object], report: Report) -> PreTrainedModel:
    """The reader shows its progress through a module global named tqdm: ours takes its place for one load."""
    shown = gguf_reader.tqdm
    gguf_reader.tqdm = lambda tensors, **_: _counted(tensors, report)
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    finally:
        gguf_reader.tqdm = shown
    # The weights are dequantized by now; left in place, these would have the saved directory load as a quantised model.
    model.hf_quantizer = None
    model.is_quantized = False
    del model.config.quantization_config
    return model


def _counted(tensors: Sequence[object], report: Report) -> Iterator[object]:
    for index, tensor in enumerate(tensors):
        report("Dequantizing the weights", index, len(tensors))
        yield tensor
    report("Dequantizing the weights", len(tensors), len(tensors))


def main() -> None:
    job = json.loads(sys.stdin.readline())

    def report(stage: str, done: int, total: int | None) -> None:
        # A parent that died closes the pipe: the write fails and ends this process too, which is what we want.
        sys.stdout.write(json.dumps({"stage": stage, "done": done, "total": total}) + "\n")
        sys.stdout.flush()

    convert_gguf(Path(job["gguf"]), Path(job["target"]), report)


if __name__ == "__main__":
    main()
