"""Adapter directories that were made to hang a server, to fill its memory, or to read what they should not."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
NEVER = "[!?]"  # no module's name has it; a single letter would be looked for first, and nothing tried
EMPTY_ALTERNATIVES = "(|.|..|...)" * 60 + NEVER  # no quantifier in it, and `re` never comes back
HOSTILE_PATTERNS = {
    "empty-alternatives": EMPTY_ALTERNATIVES,
    "empty-alternatives-and-a-letter": "(|.|..|...)" * 60 + "!",
    "nested-plus": "([a-z_.0-9]+)+" + NEVER,
    "nested-star": "((.*)*)*" + NEVER,
    "two-ways": "(.|[a-z]|.)*" + NEVER,
    "many-stars": ".*" * 200 + NEVER,
    "many-questions": "(?:.?)" * 300 + ".{300}",
    "counted": "(.{0,99}){0,99}" + NEVER,
    "counted-high": "((.{0,999}){0,999}){0,999}" + NEVER,
    "back-references": r"(.*)(.*)(.*)(.*)(.*)\1\2\3\4\5" + NEVER,
    "lookaheads": "(?=(.*.*.*.*)*[!?])" * 20,
    "lookbehind": "(?:.*(?<=[a-z]{3}))*" + NEVER,
    "negative-lookaheads": "(?!(.+)+[!?])" * 20 + NEVER,
    "conditional": "(a)?(?(1)(.*)*|(.+)+)" + NEVER,
    "case": "(?i)" + "([a-zſK]+)+" + NEVER,
    "fuzzy": "(?:model.layers){e<=30}" + NEVER,
    "possessive": "(?:(.*+)*)*" + NEVER,
    "deep": "(" * 400 + "." + ")*" * 400 + NEVER,
    "alternatives": "(" + "|".join(["[a-z_.0-9]*" + "x" * i for i in range(1, 60)]) + ")*" + NEVER,
    "unbalanced": "(" * 1000,
    "long": "x" * 100_000,
    "sets": "[" + "".join(map(chr, range(0x4E00, 0x5200))) + "]*" + NEVER,
    "named": "(?P<layer_number>.*)*" + NEVER,
}

Files = Callable[[bytes, bytes], tuple[bytes, bytes]]


def _config(**changes: Any) -> Files:
    return lambda config, weights: (json.dumps(json.loads(config) | changes).encode(), weights)


def _lora(**changes: Any) -> Files:
    plain = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    return lambda _, weights: (json.dumps(plain | changes).encode(), weights)


def _text(config_text: bytes) -> Files:
    return lambda _, weights: (config_text, weights)


def _header(header: bytes, data: bytes = b"") -> Files:
    return lambda config, _: (config, len(header).to_bytes(8, "little") + header + data)


def _weights(weights: bytes) -> Files:
    return lambda config, _: (config, weights)


def _tensor(name: str, shape: str = "[1]", offsets: str = "[0, 4]", dtype: str = "F32") -> str:
    return f'"{name}": {{"dtype": "{dtype}", "shape": {shape}, "data_offsets": {offsets}}}'


def _tensors(count: int, name: str = "t{}") -> bytes:
    tensors = (_tensor(name.format(i), "[0]", "[0,0]").replace(" ", "") for i in range(count))
    return ("{" + ",".join(tensors) + "}").encode()


BOMBS: dict[str, Files] = {
    **{f"target-{kind}": _config(target_modules=pattern) for kind, pattern in HOSTILE_PATTERNS.items()},
    **{f"exclude-{kind}": _lora(exclude_modules=HOSTILE_PATTERNS[kind]) for kind in ("empty-alternatives", "counted")},
    **{
        f"{key}-{kind}": _lora(**{key.replace("-", "_"): {HOSTILE_PATTERNS[kind]: 4}})
        for key in ("rank-pattern", "alpha-pattern")
        for kind in ("empty-alternatives", "nested-star", "back-references")
    },
    "layers-pattern": _config(layers_to_transform=[0], layers_pattern=[EMPTY_ALTERNATIVES]),
    "thousands-of-patterns": _lora(rank_pattern={f"(.|..|...)*{i}[!?]": 4 for i in range(8_000)}),
    "sixty-thousand-patterns": _lora(rank_pattern={f"q{i}": 4 for i in range(60_000)}),
    "sixty-thousand-targets": _config(target_modules=[f"q{i}" for i in range(60_000)]),
    "sixty-thousand-layers": _config(layers_to_transform=["x"] * 60_000),
    "thirty-thousand-keys": _text(json.dumps({f"k{i}": [1] for i in range(20_000)}).encode()),
    "deep-json": _text(b'{"r":' + b"[" * 60_000 + b"]" * 60_000 + b"}"),
    "deep-enough": _text(b'{"peft_type": "LORA", "bias":' + b"[" * 900 + b"]" * 900 + b"}"),
    "a-million-brackets": _text(b"[" * 1_000_000),
    "a-million-commas": _text(b'{"r": [' + b"0," * 500_000 + b"0]}"),
    "digits": _text(b'{"r": ' + b"9" * 1_000_000 + b"}"),
    "digits-of-a-float": _text(b'{"r": 0.' + b"9" * 1_000_000 + b"}"),
    "infinite": _config(alpha=float("inf")),
    "not-a-number": _config(alpha=float("nan")),
    "huge-exponent": _text(b'{"peft_type": "LORA", "r": 1e999999, "lora_alpha": 1e400, "target_modules": ["q"]}'),
    "rank-of-true": _config(r=True),
    "k-of-zero": _config(gralora_k=0),
    "rank-beyond": _config(r=1 << 20, gralora_k=1 << 20),
    "a-long-key": _text(json.dumps({"peft_type": "GRALORA", "x" * 900_000: 1}).encode()),
    "a-key-twice": lambda config, weights: (config[:-1].rstrip() + b', "r": 4, "r": 8}', weights),
    "surrogates": _text(b'{"peft_type": "\\ud800", "target_modules": ["\\udfff"], "x\\ud800": 1}'),
    "utf-16": lambda config, weights: (config.decode().encode("utf-16"), weights),
    "nul": _text(b'{"peft_type": "LORA\\u0000"}' + b"\0" * 1000),
    "two-megabytes": _text(b'{"a": "' + b"x" * 2_000_000 + b'"}'),
    "empty-config": _text(b""),
    "empty-weights": _weights(b""),
    "header-of-absurd-length": _weights((1 << 62).to_bytes(8, "little") + b"{}"),
    "header-of-spaces": _header(b" " * (6 << 20)),
    "header-of-brackets": _header(b"[" * (6 << 20)),
    "header-of-empty-objects": _header(b"{" + b",".join(b'"%x":{}' % i for i in range(400_000)) + b"}"),
    "header-of-empty-lists": _header(b'{"a":[' + b"[]," * 1_000_000 + b"[]]}"),
    "header-too-long": _header(b"{" + b" " * (20 << 20) + b"}"),
    "forty-thousand-tensors": _header(_tensors(39_900)),
    "forty-thousand-strange-names": _header(
        _tensors(39_900, "model.language_model.layers.{}.q_proj.lora_A.own.weight")
    ),
    "a-hundred-thousand-tensors": _header(_tensors(100_000)),
    "sizes-of-4200-digits": _header(("{" + _tensor("x", "[" + ",".join(["9" * 4200] * 1400) + "]") + "}").encode()),
    "sizes-of-60-digits": _header(("{" + _tensor("x", "[" + ",".join(["9" * 60] * 3400) + "]") + "}").encode()),
    "a-hundred-thousand-sizes": _header(("{" + _tensor("x", "[" + ",".join(["2"] * 100_000) + "]") + "}").encode()),
    "negative-sizes": _header(("{" + _tensor("x", "[-1, -1]") + "}").encode(), b"\0" * 4),
    "offsets-backwards": _header(("{" + _tensor("x", "[0]", "[0, -9007199254740992]", "I8") + "}").encode()),
    "petabytes": _header(("{" + _tensor("x", f"[{1 << 50}]", f"[0, {1 << 52}]") + "}").encode()),
    "a-name-of-megabytes": _header(("{" + _tensor("x" * 5_000_000) + "}").encode(), b"\0" * 4),
    "names-beyond-ascii": _header(("{" + _tensor("\N{PILE OF POO}" * 1_200_000) + "}").encode(), b"\0" * 4),
    "names-in-escapes": _header(("{" + _tensor("\\ud83d\\udca9" * 400_000) + "}").encode(), b"\0" * 4),
    "metadata-of-megabytes": _header(b'{"__metadata__": {' + b",".join(b'"%x":""' % i for i in range(500_000)) + b"}}"),
    "metadata-as-long-as-may-be": _header(
        b'{"__metadata__": {' + b",".join(b'"%x":1' % i for i in range(199_900)) + b"}}"
    ),
    "metadata-deep": _header(b'{"__metadata__": ' + b"[" * 50_000 + b"]" * 50_000 + b"}"),
    "a-tensor-twice": _header(("{" + _tensor("x") + "," + _tensor("x") + "}").encode(), b"\0" * 4),
}


def _replace(file: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    def replace(folder: Path) -> None:
        (folder / file).unlink()
        make(folder / file)

    return replace


def _bind(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        here = Path.cwd()
        os.chdir(path.parent)  # the path of a socket is short
        try:
            bound.bind(path.name)
        finally:
            os.chdir(here)


def _grow(path: Path) -> None:
    with path.open("wb") as file:
        file.write((2).to_bytes(8, "little") + b"{}")
        file.truncate(1 << 40)


TRAPS: dict[str, Callable[[Path], None]] = {
    "config-is-a-pipe": _replace(CONFIG, os.mkfifo),
    "weights-are-a-pipe": _replace(WEIGHTS, os.mkfifo),
    "weights-are-a-socket": _replace(WEIGHTS, _bind),
    "config-is-a-folder": _replace(CONFIG, Path.mkdir),
    "weights-are-a-folder": _replace(WEIGHTS, Path.mkdir),
    "weights-are-zeros-for-ever": _replace(WEIGHTS, lambda path: path.symlink_to("/dev/zero")),
    "config-is-the-password-file": _replace(CONFIG, lambda path: path.symlink_to("/etc/passwd")),
    "config-is-our-memory": _replace(CONFIG, lambda path: path.symlink_to("/proc/self/mem")),
    "weights-are-themselves": _replace(WEIGHTS, lambda path: path.symlink_to(path.name)),
    "weights-are-nowhere": _replace(WEIGHTS, lambda path: path.symlink_to("nowhere")),
    "weights-of-a-terabyte": _replace(WEIGHTS, _grow),
}


def write_hostile(good: Path, root: Path, more: Mapping[str, Files] = {}) -> tuple[str, ...]:
    """One directory below `root` for each way, made from the good adapter in `good`; their names."""
    config, weights = (good / CONFIG).read_bytes(), (good / WEIGHTS).read_bytes()
    for name, files in (BOMBS | dict(more)).items():
        folder = root / name
        folder.mkdir(parents=True)
        for file, content in zip((CONFIG, WEIGHTS), files(config, weights), strict=True):
            (folder / file).write_bytes(content)
    for name, trap in TRAPS.items():
        trap(Path(shutil.copytree(good, root / name)))
    return (*BOMBS, *more, *TRAPS)
