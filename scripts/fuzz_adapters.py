"""Grows adapter directories that could hurt a server, for as long as it is told, and keeps the worst of them.

    python scripts/fuzz_adapters.py --seconds 120 --out build/fuzz

Starts from the hostile directories of the tests, and lets a coverage-guided fuzzer (atheris: libFuzzer for Python)
change configs and headers. Whatever it makes has to be served or refused with AdapterRejectedError, in two seconds of
processor time and 64 MB; otherwise this fails and says where the input lies. OUT/adapters then has the inputs that took
most, one directory each: the tests load them into a real server when GRALORA_FUZZED_ADAPTERS names it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "kernels"), str(ROOT)]

MAX_PROCESSOR_S, MAX_MEMORY_BYTES = 2.0, 64 << 20
MAX_INPUT_BYTES = 1 << 16  # what is larger is known already, and slow to mutate
NUM_KEPT = 40
COUNTED = "counted"  # a file of OUT
MODULES = [(f"model.layers.{layer}.self_attn.{kind}_proj", 64, 64) for layer in range(8) for kind in "qkvo"]

ATOMS = [
    r".",
    r"a",
    r"[a-z_.0-9]",
    r"(|.|..)",
    r"\w",
    r"\.",
    r"[^x]",
    r"layers",
    r"q_proj",
    r"(?:)",
    r"^",
    r"$",
    r"\b",
    r"!",
]
REPEATS = ["", "", "*", "+", "?", "*?", "+?", "{2,9}", "{0,999}", "{3}", "*+", "{e<=2}", "{,5}"]
GROUPS = [
    r"({})",
    r"(?:{})",
    r"(?={})",
    r"(?!{})",
    r"(?<={})",
    r"(?>{})",
    r"(?i:{})",
    r"({}|{})",
    r"(|{})",
    r"({})\1",
    r"(?P<layer_number>{})",
]
NUMBERS: list[Any] = [0, -1, 1, 2, 4, 1 << 20, 1 << 63, 10**60, 0.5, 1e308, float("inf"), float("nan")]
NAMES: list[Any] = ["", "x", "q_proj", ["q_proj"], "all-linear", "\ud800", "é", "GRALORA", "LORA"]
VALUES = [*NUMBERS, *NAMES, None, True, False, [], {}, [1], {"q_proj": 4}, [[[[]]]], {"": {"": {}}}, [0] * 100]
KEYS = [
    "peft_type",
    "r",
    "alpha",
    "gralora_alpha",
    "gralora_k",
    "hybrid_r",
    "lora_alpha",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "bias",
    "modules_to_save",
    "task_type",
    "init_lora_weights",
    "unsloth_fixed",
]
PATTERN_KEYS = ("target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern")


def pack(config: bytes, header: bytes, padding: int = 0) -> bytes:
    """One input: two texts, and how many bytes of weights follow."""
    return len(config).to_bytes(4, "little") + padding.to_bytes(2, "little") + config + header


def unpack(data: bytes) -> tuple[bytes, bytes]:
    """The two files of an adapter directory."""
    length, padding = int.from_bytes(data[:4], "little"), int.from_bytes(data[4:6], "little")
    config, header = data[6 : 6 + length], data[6 + length :]
    return config, len(header).to_bytes(8, "little") + header + bytes(padding)


def random_pattern(rng: random.Random, depth: int = 3) -> str:
    parts = []
    for _ in range(rng.randint(1, 4)):
        atom = rng.choice(ATOMS)
        if depth and rng.random() < 0.5:
            group = rng.choice(GROUPS)
            atom = group.format(*(random_pattern(rng, depth - 1) for _ in range(group.count("{}"))))
        parts.append(atom + rng.choice(REPEATS))
    return "".join(parts) * rng.choice([1, 1, 1, 2, 30])


def change(rng: random.Random, config: dict[str, Any]) -> None:
    key = rng.choice([*KEYS, *config])
    if key in PATTERN_KEYS and rng.random() < 0.8:
        pattern = random_pattern(rng)
        config[key] = rng.choice([pattern, [pattern], {pattern: 4}])
        if key.endswith("_pattern") or key.startswith("exclude"):
            config["peft_type"] = rng.choice(["LORA", config.get("peft_type")])
    elif rng.random() < 0.2:
        config.pop(key, None)
    else:
        config[key] = rng.choice(VALUES)


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """A change of the config's meaning half of the time, of any bytes otherwise."""
    import atheris

    rng = random.Random(seed)  # noqa: S311 -- the fuzzer's own numbers
    if rng.random() < 0.5:
        return bytes(atheris.Mutate(data, max_size))
    config, weights = unpack(data)
    try:
        parsed = json.loads(config)
        for _ in range(rng.randint(1, 3)):
            change(rng, parsed)
        config = json.dumps(parsed).encode()
    except (ValueError, RecursionError, AttributeError, TypeError):
        return bytes(atheris.Mutate(data, max_size))
    header_bytes = int.from_bytes(weights[:8], "little")
    return pack(config, weights[8 : 8 + header_bytes], len(weights) - 8 - header_bytes)[:max_size]


def fuzz(corpus: Path, seconds: int, artifacts: Path) -> None:
    """Does not return: libFuzzer ends the process."""
    import atheris

    with atheris.instrument_imports(include=["gralora_runtime.adapters"]):
        from gralora_runtime.adapters.checkpoint.header import inspect as read_header
    from support.measured_inspection import peak_bytes, reset_peak

    from gralora_runtime.adapters.checkpoint.spec import ModuleShape
    from gralora_runtime.errors import AdapterRejectedError

    modules = [ModuleShape(*shape) for shape in MODULES]
    folder = corpus.parent / "now" / "fuzzed"
    folder.mkdir(parents=True)
    counted = (corpus.parent / COUNTED).open("wb", buffering=0)

    def test_one_input(data: bytes) -> None:
        counted.write(b".")  # libFuzzer ends the process, and says nothing of how many there were
        write(folder, data)
        reset_peak()
        before_bytes, started_s = peak_bytes(), time.process_time()
        try:
            header = read_header(folder, roots=(folder.parent,))
            header.fitting_plan(modules)
            header.summary(modules)
        except AdapterRejectedError as error:
            assert len(str(error)) < 50_000  # noqa: PT017 -- no test of pytest's
        assert time.process_time() - started_s < MAX_PROCESSOR_S, "it took too long"
        assert peak_bytes() - before_bytes < MAX_MEMORY_BYTES, "it took too much memory"

    options = [f"-max_total_time={seconds}", f"-max_len={MAX_INPUT_BYTES}", "-timeout=30", "-verbosity=0"]
    atheris.Setup([sys.argv[0], str(corpus), f"-artifact_prefix={artifacts}/", *options], test_one_input,
                  custom_mutator=mutate)  # fmt: skip
    atheris.Fuzz()


def count(out: Path) -> int:
    """Inputs that were tried: a byte each."""
    return (out / COUNTED).stat().st_size


def write(folder: Path, data: bytes) -> None:
    from support.hostile import CONFIG, WEIGHTS

    for file, content in zip((CONFIG, WEIGHTS), unpack(data), strict=True):
        (folder / file).write_bytes(content)


def wrapped(config: bytes, weights: bytes) -> tuple[bytes, bytes]:
    """Names of tensors as they are in a multimodal model, and with the adapter's own."""
    size = 8 + int.from_bytes(weights[:8], "little")
    header = weights[8:size].replace(b".model.layers", b".model.language_model.layers").replace(b'_A"', b'_A.default"')
    header = header.replace(b'_B"', b'_B.default"')
    return config, len(header).to_bytes(8, "little") + header + weights[size:]


def write_seeds(corpus: Path) -> None:
    from support.checkpoints import write_gralora
    from support.hostile import BOMBS, CONFIG, WEIGHTS

    corpus.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as temporary:
        good = write_gralora(Path(temporary) / "good")
        texts = (good / CONFIG).read_bytes(), (good / WEIGHTS).read_bytes()
    for name, files in ({"good": lambda *pair: pair, "wrapped": wrapped} | BOMBS).items():
        config, weights = files(*texts)
        header = weights[8 : 8 + int.from_bytes(weights[:8], "little")]
        padding = min(len(weights) - 8 - len(header), 65535) if len(weights) > 8 else 0
        if len(config) + len(header) < MAX_INPUT_BYTES:
            (corpus / name).write_bytes(pack(config, header, max(padding, 0)))


def keep_the_worst(corpus: Path, out: Path) -> None:
    """By processor time and by memory, measured one by one."""
    every = out / "every"
    for number, path in enumerate(sorted(corpus.iterdir())):
        folder = every / f"fuzzed-{number}"
        folder.mkdir(parents=True)
        write(folder, path.read_bytes())
    (out / "modules.json").write_text(json.dumps(MODULES))
    command = [sys.executable, "-m", "support.measured_inspection", every, out / "modules.json"]
    environment = {"PYTHONPATH": ":".join(sys.path[:3])}
    run = subprocess.run(  # noqa: S603 -- ourselves
        [*map(str, command)], cwd=ROOT / "tests", check=True, capture_output=True, text=True, env=environment
    )
    found = [line for line in map(json.loads, run.stdout.splitlines()) if line["refused"]]
    worst = sorted(found, key=lambda line: line["processor_s"])[-NUM_KEPT // 2 :]
    worst += sorted(found, key=lambda line: line["memory_bytes"])[-NUM_KEPT // 2 :]
    for line in worst:
        shutil.copytree(every / line["name"], out / "adapters" / line["name"], dirs_exist_ok=True)
    shutil.rmtree(every)
    slowest, largest = (max((line[key] for line in found), default=0) for key in ("processor_s", "memory_bytes"))
    print(f"{len(found)} refused inputs: at most {slowest:.2f} s of processor time, {largest / 2**20:.1f} MiB")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=120)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "fuzz")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    corpus, artifacts = options.out / "corpus", options.out / "failures"
    if importlib.util.find_spec("atheris") is None:
        print("atheris is not installed (it has wheels for Linux on x86_64 only): nothing is fuzzed", file=sys.stderr)
        return 0
    if options.child:
        fuzz(corpus, options.seconds, artifacts)
    shutil.rmtree(options.out, ignore_errors=True)
    write_seeds(corpus)
    artifacts.mkdir()
    command = [sys.executable, __file__, "--child", "--seconds", str(options.seconds), "--out", str(options.out)]
    code = subprocess.run(command, check=False).returncode  # noqa: S603 -- ourselves
    if code or any(artifacts.iterdir()):
        print(f"the fuzzer found something: see {artifacts}", file=sys.stderr)
        return 1
    keep_the_worst(corpus, options.out)
    print(f"{count(options.out)} mutated checkpoints in {options.seconds} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
