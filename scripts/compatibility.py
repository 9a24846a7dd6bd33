"""Writes `docs/compatibility.md` again: what is served by which path, from what the tests compare with PEFT."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "examples")]

from interpreted.test_program import BUILDS  # noqa: E402
from model.test_start_refusals import OTHERS  # noqa: E402
from support.served import WITHOUT_PROGRAM, adapter_configs  # noqa: E402
from support.tiny_models import ARCHITECTURES, tiny_model  # noqa: E402

from gralora_runtime.adapters.checkpoint.config_keys import GRALORA_KEYS, LORA_KEYS, OF_THE_OTHER, Key, is_off  # noqa: E402
from gralora_runtime.adapters.checkpoint.spec import parse_config  # noqa: E402

DOC = ROOT / "docs" / "compatibility.md"
HEAD = """\
# What is served

Written by `python scripts/compatibility.py` from what the tests compare with PEFT.

"""
CPU, GPU = "../tests/model/test_exactness.py", "../tests/interpreted/test_program.py"
SUMS = "../tests/engine/test_mixes.py"
REFUSALS, CONFIGS = "../tests/model/test_start_refusals.py", "../tests/adapters/test_spec.py"
# Of a config, that are worth a word.
SPECIALS = ("use_rslora", "rank_pattern", "layers_to_transform", "alora_invocation_tokens")


def main() -> None:
    DOC.write_text(page())


def page() -> str:
    return HEAD + "\n".join([*_models(), "", *_adapters(), "", *_keys(), ""])


def _models() -> Iterator[str]:
    yield "## Base models\n"
    yield f"Each with every kind of adapter at once: logits are PEFT's, on the CPU ([test]({CPU})) and through the"
    yield f"GPU's kernels in Triton's interpreter ([test]({GPU})). Any other model of transformers with ordinary causal"
    yield "attention runs transformers' own forward pass, if it passes the comparison at start.\n"
    yield "| | CPU | GPU |"
    yield "|---|---|---|"
    for architecture in ARCHITECTURES:
        name = type(tiny_model(architecture)).__name__
        also = ", with biases" if architecture.endswith("-biased") else ""
        slow = architecture in WITHOUT_PROGRAM
        gpu = "program" if architecture in BUILDS else "transformers" if slow else "program, untested"
        yield f"| `{name}`{also} | {'transformers' if slow else 'program'} | {gpu} |"
    yield (
        "\nRefused at start, in a sentence and with exit code 2 ([test](" + REFUSALS + ")): " + ", ".join(OTHERS) + ";"
    )
    yield "encoder-decoders, quantized checkpoints, rotary angles that depend on the batch."


def _adapters() -> Iterator[str]:
    yield "## Adapters\n"
    yield "Alone and mixed in one batch, through the reference, CPU and Triton kernels.\n"
    yield "| as the tests call it | what it is |"
    yield "|---|---|"
    for name, config in adapter_configs("llama", all_ranks=False).items():
        written = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
        spec = parse_config(name, written)
        parts = f"r {spec.rank}, {spec.blocks} blocks" if spec.blocks > 1 else f"r {spec.rank}"
        hybrid = f", hybrid r {spec.hybrid_rank}" if spec.hybrid_rank else ""
        also = [key for key in SPECIALS if not is_off(getattr(config, key, None))]
        told = f"; {', '.join(also)}" if also else ""
        yield f"| {name} | {config.peft_type.value}, {parts}{hybrid}{told} |"
    yield f"\nSeveral in one request, each times a weight: the exact sum of any kinds, on the CPU ([test]({SUMS}))."


def _keys() -> Iterator[str]:
    yield "## Keys of `adapter_config.json` that are refused where they ask for something\n"
    yield f"So is a key that nobody here knows ([test]({CONFIGS})), unless `--allow-unknown-config-key` names it.\n"
    yield "| key | |"
    yield "|---|---|"
    for name in sorted(GRALORA_KEYS.keys() & LORA_KEYS.keys()):
        key: Key = LORA_KEYS[name] if GRALORA_KEYS[name] is OF_THE_OTHER else GRALORA_KEYS[name]
        if (
            key is not OF_THE_OTHER
            and key.otherwise != Key.__dataclass_fields__["otherwise"].default
            and not key.neutral("something")
        ):
            yield f"| `{name}` | {key.otherwise} |"


if __name__ == "__main__":
    main()
