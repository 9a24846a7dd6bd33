"""Writes `docs/compatibility.md` again: what is served by which path, from what the tests compare with PEFT."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "examples")]

from interpreted.test_program import BUILDS  # noqa: E402
from model.test_language_model import MULTIMODAL  # noqa: E402
from model.test_start_refusals import OTHERS  # noqa: E402
from support.larger import larger_configs  # noqa: E402
from support.served import (  # noqa: E402
    MIXTURES,
    WITHOUT_PROGRAM,
    adapter_configs,
    expert_configs,
    replacing_configs,
)
from support.tiny_models import ARCHITECTURES, OTHER_BUILDS, tiny_model  # noqa: E402

from gralora_runtime.adapters.checkpoint.config_keys import GRALORA_KEYS, LORA_KEYS, OF_THE_OTHER, Key, is_off  # noqa: E402
from gralora_runtime.adapters.checkpoint.spec import parse_config  # noqa: E402

DOC = ROOT / "docs" / "compatibility.md"
HEAD = """\
# What is served

Written by `python scripts/compatibility.py` from what the tests compare with PEFT.

"""
CPU, GPU = "../tests/model/test_exactness.py", "../tests/interpreted/test_program.py"
REPLACED = "../tests/model/test_replaced.py"
LARGER, LARGER_GPU = "../tests/model/test_larger_vocabulary.py", "../tests/interpreted/test_larger.py"
ADDED, OWN_TEXT = "../tests/engine/test_added_tokens.py", "../tests/engine/test_own_tokens.py"
EXPERTS = "../tests/model/test_experts.py"
SUMS = "../tests/engine/test_mixes.py"
OTHERS_TEST, INNER = "../tests/model/test_other_builds.py", "../tests/model/test_language_model.py"
PARTS = "../tests/interpreted/test_rows.py"
REFUSALS, CONFIGS = "../tests/model/test_start_refusals.py", "../tests/adapters/test_spec.py"
ON_GPU_TOO = "gpt2"  # of those without a program the one that is tested there
NOTES = {
    "llama-biased": "with biases",
    "stablelm-parallel": "with parallel blocks",
    "stablelm-normed": "with norms of queries and keys",
    "cohere-normed": "with norms of queries and keys",
    "opt-350m": "with norms behind its blocks",
    MULTIMODAL: "of which the language model is read",
}
# Of a config, that are worth a word.
SPECIALS = (
    "use_rslora", "rank_pattern", "layers_to_transform", "alora_invocation_tokens", "use_dora", "lora_bias", "bias",
    "modules_to_save", "trainable_token_indices", "target_parameters",
)  # fmt: skip
ALL_LINEAR = "all-linear"  # in a mixture's experts and router too
ENDS = {"lm_head": "on the output head", "embed_tokens": "on the embedding"}


def main() -> None:
    DOC.write_text(page())


def page() -> str:
    return HEAD + "\n".join([*_models(), "", *_adapters(), "", *_keys(), ""])


def _models() -> Iterator[str]:
    yield "## Base models\n"
    yield "Each with every kind of adapter at once: logits are PEFT's, on the CPU, and through the GPU's kernels in"
    yield "Triton's interpreter. Behind each path is its test. A program is ours; transformers is its own forward pass"
    yield "with our layers in it. Any other model of transformers with ordinary causal attention runs so, if it"
    yield "passes the comparison at start.\n"
    yield "| | CPU | GPU |"
    yield "|---|---|---|"
    for architecture in (*ARCHITECTURES, MULTIMODAL, *OTHER_BUILDS):
        name = type(tiny_model(architecture)).__name__
        note = f", {NOTES[architecture]}" if architecture in NOTES else ""
        yield f"| `{name}`{note} | {_on_cpu(architecture)} | {_on_gpu(architecture)} |"
    yield "\nRefused at start, in a sentence and with exit code 2, as encoder-decoders are, quantized checkpoints,"
    yield "rotary angles that depend on the batch, and multimodal models whose language model is not one of its own:\n"
    yield "| | |"
    yield "|---|---|"
    for name, (_, reason) in OTHERS.items():
        yield f"| [{name}]({REFUSALS}) | {reason} |"


def _on_cpu(architecture: str) -> str:
    path = "transformers" if architecture in WITHOUT_PROGRAM else "program"
    test = OTHERS_TEST if architecture in OTHER_BUILDS else INNER if architecture == MULTIMODAL else CPU
    return f"[{path}]({test})"


def _on_gpu(architecture: str) -> str:
    if architecture in WITHOUT_PROGRAM:
        return f"[transformers]({GPU})" if architecture == ON_GPU_TOO else "transformers"
    return f"[program]({GPU})" if architecture in BUILDS else f"program of [these parts]({PARTS})"


def _adapters() -> Iterator[str]:
    yield "## Adapters\n"
    yield "Alone and mixed in one batch, through the reference, CPU and Triton kernels"
    yield f"([test]({CPU}), and of [what stands in the place of the base model's]({REPLACED})).\n"
    yield "| as the tests call it | what it is |"
    yield "|---|---|"
    kinds = adapter_configs("llama-biased") | adapter_configs("llama", all_ranks=False)
    kinds |= replacing_configs("llama") | expert_configs("mixtral")
    for name, config in kinds.items():
        written = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
        spec = parse_config(name, written)
        parts = f"r {spec.rank}, {spec.blocks} blocks" if spec.blocks > 1 else f"r {spec.rank}"
        hybrid = f", hybrid r {spec.hybrid_rank}" if spec.hybrid_rank else ""
        values = {key: getattr(config, key, None) for key in SPECIALS}
        also = [key for key, value in values.items() if not is_off(value) and value != "none"]
        also += [where for name, where in ENDS.items() if name in config.target_modules]
        also += [ALL_LINEAR] if config.target_modules == ALL_LINEAR else []
        told = f"; {', '.join(also)}" if also else ""
        yield f"| {name} | {config.peft_type.value}, {parts}{hybrid}{told} |"
    names = ", ".join(f"`{type(tiny_model(architecture)).__name__}`" for architecture in MIXTURES)
    larger = ", ".join(larger_configs("llama", tied=True))
    yield f"\nWith tokens that the base model does not have: {larger} ([test]({LARGER})), and by Triton's kernels"
    yield f"([test]({LARGER_GPU})); in requests ([test]({ADDED})), and as text ([test]({OWN_TEXT}))."
    yield f"\nThose with target_parameters are on experts, or a router: of {names} ([test]({EXPERTS}))."
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
