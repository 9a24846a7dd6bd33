"""Reading a directory without its weights: what is wrong is told in words, all of it, and cheaply."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.checkpoints import (
    MODULES,
    edit_config,
    edit_tensors,
    gralora_tensors,
    lora_config,
    lora_tensors,
    write_checkpoint,
    write_gralora,
    write_lora,
)

from gralora_runtime.adapters.checkpoint import tensors as tensors_module
from gralora_runtime.adapters.checkpoint.header import (
    CONFIG_FILE,
    MAX_CONFIG_BYTES,
    PICKLE_FILE,
    AdapterSummary,
    inspect,
)
from gralora_runtime.adapters.checkpoint.spec import MAX_PROBLEMS, Dialect, ModuleShape
from gralora_runtime.adapters.checkpoint.tensors import WEIGHTS_FILE
from gralora_runtime.errors import AdapterRejectedError

Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


def rejection(path: Path, roots: tuple[Path, ...] = ()) -> str:
    with pytest.raises(AdapterRejectedError) as caught:
        inspect(path, name="a", roots=roots)
    assert caught.value.name == "a"
    return "\n".join(caught.value.problems)


def test_the_header_tells_rank_blocks_targets_and_size(tmp_path: Path) -> None:
    header = inspect(write_gralora(tmp_path / "a", r=8, k=4, hybrid_r=2))

    numel = sum(tensor.numel() for tensor in gralora_tensors(r=8, k=4, hybrid_r=2).values())

    assert (header.dialect, header.rank, header.blocks, header.hybrid_rank) == (Dialect.PEFT_GRALORA, 8, 4, 2)
    assert header.equivalent_rank == 4 * 8 + 2
    assert tuple(sorted(module.name for module in MODULES)) == header.targets
    assert 4 * numel == header.tensor_bytes
    assert header.fits(MODULES) == []


@pytest.mark.parametrize("name", ["x" * 300, "a/" * 3000 + "a"], ids=["name", "path"])
def test_a_directory_whose_name_no_file_system_takes_is_refused(tmp_path: Path, name: str) -> None:
    """A client that asked for it to be loaded was told of an internal error."""
    assert rejection(tmp_path / name, roots=(tmp_path,)) == "adapter_config.json cannot be read (File name too long)"


def test_the_summary_has_the_largest_rank_of_all_modules(tmp_path: Path) -> None:
    tensors = lora_tensors(r=4) | lora_tensors([MODULES[2]], r=8)
    config = lora_config(r=4, lora_alpha=16, rank_pattern={"layers.0.mlp.down_proj": 8}, base_model_name_or_path="m")

    header = inspect(write_checkpoint(tmp_path / "a", config, tensors))
    expected = AdapterSummary(
        dialect=Dialect.LORA,
        rank=8,
        blocks=1,
        hybrid_rank=0,
        equivalent_rank=8,
        scale=4.0,
        num_modules=6,
        tensor_bytes=4 * sum(tensor.numel() for tensor in tensors.values()),
        packed_numel=sum(tensor.numel() for tensor in tensors.values()),
        base_model="m",
    )

    assert header.fits(MODULES) == []
    assert expected == header.summary(MODULES)
    assert header.equivalent_rank == 8


def test_reading_the_header_does_not_read_the_weights(tmp_path: Path) -> None:
    """The weights are garbage of the right length here, which only `load` may notice."""
    path = write_gralora(tmp_path / "a") / WEIGHTS_FILE
    data = path.read_bytes()
    header_bytes = 8 + int.from_bytes(data[:8], "little")
    path.write_bytes(data[:header_bytes] + b"\xff" * (len(data) - header_bytes))

    assert inspect(tmp_path / "a").fits(MODULES) == []


BROKEN_CONFIGS: dict[str, tuple[bytes, str]] = {
    "no JSON": (b"r: 8", "is not JSON"),
    "no text": (b"\xff\xfe\x00", "is not JSON"),
    "empty": (b"", "is not JSON"),
    "a list": (b"[1]", "is not a JSON object but list"),
    "null": (b"null", "is not a JSON object but NoneType"),
    "too deep": (b"[" * 50_000, "is not JSON"),
    "too many values": (b'{"r": [' + b"0," * 140_000 + b"0]}", "has more than 131072 entries"),
    "a key twice": (b'{"r": 1, "r": 2}', "a key stands twice"),
    "a float of a million digits": (b'{"r": 1.' + b"9" * 1_000_000 + b"}", "a number of 1000002 characters"),
    "too large": (b'{"r": "' + b"x" * MAX_CONFIG_BYTES + b'"}', "has more than"),
    "a number of 5000 digits": (b'{"r": ' + b"9" * 5000 + b"}", "is not JSON"),
}


@pytest.mark.parametrize("kind", BROKEN_CONFIGS)
def test_a_broken_config_is_told_from_an_unsupported_one(tmp_path: Path, kind: str) -> None:
    text, told = BROKEN_CONFIGS[kind]
    write_gralora(tmp_path / "a")
    (tmp_path / "a" / CONFIG_FILE).write_bytes(text)

    assert told in rejection(tmp_path / "a")


@pytest.mark.parametrize("file", [CONFIG_FILE, WEIGHTS_FILE])
def test_a_missing_file_is_named(tmp_path: Path, file: str) -> None:
    (write_gralora(tmp_path / "a") / file).unlink()

    assert f"{file} is missing" == rejection(tmp_path / "a")


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo], ids=["directory", "pipe"])
def test_what_is_no_regular_file_is_never_opened(tmp_path: Path, make: Callable[[Path], None]) -> None:
    """Opening a pipe that nobody writes to would hang the reader for good."""
    (write_gralora(tmp_path / "a") / CONFIG_FILE).unlink()
    make(tmp_path / "a" / CONFIG_FILE)

    assert f"{CONFIG_FILE} is missing" == rejection(tmp_path / "a")


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    assert rejection(tmp_path / "nowhere") == "there is no directory nowhere"


def test_pickled_weights_are_refused_by_name(tmp_path: Path) -> None:
    path = write_gralora(tmp_path / "a")
    (path / WEIGHTS_FILE).rename(path / PICKLE_FILE)

    assert rejection(path) == (
        f"{PICKLE_FILE} is a pickle, which can run code, and is not read; where it was made, PeftModel.from_pretrained("
        "base_model, 'a').save_pretrained('a', safe_serialization=True) writes what is"
    )


def test_a_pickle_beside_weights_is_nobody_s_business(tmp_path: Path) -> None:
    path = write_gralora(tmp_path / "a")
    (path / PICKLE_FILE).write_bytes(b"whatever")

    assert inspect(path).fits(MODULES) == []


def test_where_trainer_left_checkpoints_the_newest_is_named(tmp_path: Path) -> None:
    """A directory of another name is not: whoever asks for one may not be meant to learn of all that lies in it."""
    for name in ("checkpoint-500", "checkpoint-1000", "checkpoint-x", "runs", "secret"):
        write_gralora(tmp_path / "run" / name)
    (tmp_path / "run" / "checkpoint-2000").mkdir()
    (tmp_path / "run" / "checkpoint-3000").write_text("a file")
    (tmp_path / "other" / "secret").mkdir(parents=True)
    write_gralora(tmp_path / "other" / "secret")

    assert rejection(tmp_path / "run") == (
        f"{CONFIG_FILE} is missing; run/checkpoint-1000 has one: name that directory"
    )
    assert rejection(tmp_path / "other") == f"{CONFIG_FILE} is missing"
    assert inspect(tmp_path / "run" / "checkpoint-1000").fits(MODULES) == []


@pytest.mark.parametrize("file", [CONFIG_FILE, WEIGHTS_FILE])
def test_a_file_that_links_out_of_the_root_is_refused(tmp_path: Path, file: str) -> None:
    path = write_gralora(tmp_path / "root" / "a")
    (path / file).rename(tmp_path / "secret")
    (path / file).symlink_to(tmp_path / "secret")

    problem = f"{file} leaves the adapters directory through a link (--allow-root permits more)"
    assert problem == rejection(path, roots=(tmp_path / "root",))
    assert inspect(path).fits(MODULES) == []  # who names a path at the command line may link wherever


def test_a_link_inside_of_the_root_is_fine(tmp_path: Path) -> None:
    """How caches of downloaded files are laid out."""
    path = write_gralora(tmp_path / "snapshots" / "a")
    (path / WEIGHTS_FILE).rename(tmp_path / "blob")
    (path / WEIGHTS_FILE).symlink_to(tmp_path / "blob")

    assert inspect(path, roots=(tmp_path,)).fits(MODULES) == []


def test_files_cut_anywhere_are_refused(tmp_path: Path) -> None:
    path = write_gralora(tmp_path / "a") / WEIGHTS_FILE
    data = path.read_bytes()
    header_bytes = 8 + int.from_bytes(data[:8], "little")

    for length in (0, 1, 7, 8, 9, header_bytes - 1, header_bytes, header_bytes + 1, len(data) - 1):
        path.write_bytes(data[:length])
        assert "safetensors" in rejection(tmp_path / "a")
    path.write_bytes(data + b"x")
    assert "is too long" in rejection(tmp_path / "a")


HEADERS: dict[str, tuple[bytes, str]] = {
    "no JSON": (b"{", "is not JSON"),
    "a list": (b"[]", "is not a JSON object"),
    "no dtype": (b'{"x": {"shape": [1], "data_offsets": [0, 4]}}', "entry for 'x' is malformed"),
    "no object": (b'{"x": 3}', "entry for 'x' is malformed"),
    "infinite shape": (b'{"x": {"dtype": "F32", "shape": [Infinity], "data_offsets": [0, 4]}}', "is malformed"),
    "a million sizes": (
        b'{"x": {"dtype": "F32", "shape": [' + b"0," * 1_000_000 + b'0], "data_offsets": [0, 4]}}',
        "has more than 400000 entries",
    ),
    "3,400 sizes of 4,200 digits": (
        b'{"x": {"dtype": "F32", "shape": [' + b",".join([b"9" * 4200] * 1300) + b'], "data_offsets": [0, 4]}}',
        "a number of 4200 characters",
    ),
    "3,400 sizes of 60 digits": (
        b'{"x": {"dtype": "F32", "shape": [' + b",".join([b"9" * 60] * 3400) + b'], "data_offsets": [0, 4]}}',
        "entry for 'x' is malformed",
    ),
    "sizes in words": (b'{"x": {"dtype": "F32", "shape": ["1"], "data_offsets": [0, 4]}}', "is malformed"),
    "sizes that are true": (b'{"x": {"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}}', "is malformed"),
    "a tensor twice": (
        b'{"x": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}, "x": {"shape": [], "data_offsets": [0, 4]}}',
        "a key stands twice",
    ),
    "a name of 2,000 letters": (
        b'{"' + b"x" * 2000 + b'": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
        "is malformed",
    ),
    "long and beyond ASCII": (
        b'{"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "__metadata__": {"a": "'
        + "é".encode() * (1 << 19)
        + b'"}}',
        "too long for one with letters beyond ASCII",
    ),
    "short offsets": (b'{"x": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}', "is malformed"),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_a_broken_header_is_refused(tmp_path: Path, kind: str) -> None:
    text, told = HEADERS[kind]
    path = write_gralora(tmp_path / "a") / WEIGHTS_FILE
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"\0\0\0\0")

    assert told in rejection(tmp_path / "a")


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        (b'"data_offsets":[0,512]', b'"data_offsets":[9,521]', "a gap or an overlap before"),
        (b'"data_offsets":[0,512]', b'"data_offsets":[0,500]', "does not have the bytes that its shape needs"),
        (b'"data_offsets":[512,1024]', b'"data_offsets":[511,1024]', "a gap or an overlap before"),
        (b'"dtype":"F32"', b'"dtype":"F16"', "does not have the bytes that its shape needs"),
    ],
    ids=["gap at the start", "too short", "overlap", "another dtype"],
)
def test_tensors_that_do_not_lie_one_behind_the_other_are_refused(
    tmp_path: Path, old: bytes, new: bytes, told: str
) -> None:
    """The file's length fits, and so do all shapes."""
    path = write_lora(tmp_path / "a", MODULES[:1], target_modules=["q_proj"]) / WEIGHTS_FILE
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + size].replace(old, new)

    assert header != data[8 : 8 + size]
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + size :])
    assert f"{WEIGHTS_FILE} is broken: " in rejection(tmp_path / "a")
    assert told in rejection(tmp_path / "a")


def test_a_large_header_is_not_kept_in_memory(tmp_path: Path) -> None:
    """One adapter directory must not cost the server its memory; equal headers of common size are read once."""
    small = write_gralora(tmp_path / "small")
    inspect(small)
    kept = tensors_module._parse_tensors_once.cache_info()
    inspect(small)
    assert tensors_module._parse_tensors_once.cache_info().hits == kept.hits + 1

    large = write_gralora(tmp_path / "large")
    edit_tensors(large, lambda tensors: tensors.update({f"x{i:08}": torch.zeros(0) for i in range(5000)}))
    assert len(inspect(large).tensors) > 5000
    assert tensors_module._parse_tensors_once.cache_info().currsize == kept.currsize


def test_a_header_of_absurd_length_is_not_read(tmp_path: Path) -> None:
    path = write_gralora(tmp_path / "a") / WEIGHTS_FILE
    path.write_bytes((1 << 60).to_bytes(8, "little") + b"{}")

    assert "is not a safetensors file" in rejection(tmp_path / "a")


def test_missing_surplus_and_misshapen_tensors_are_told_together(tmp_path: Path) -> None:
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[f"{Q0}.gralora_A"]
        tensors[f"{Q0}.gralora_B"] = torch.zeros(2, 8, 17)
        tensors[f"{Q0}.lora_magnitude_vector"] = torch.zeros(32)
        tensors["base_model.model.lm_head.gralora_A"] = torch.zeros(2, 16, 8)
        tensors["base_model.model.model.embed_tokens.weight"] = torch.zeros(9, 32)
        tensors["base_model.model.model.embed_tokens.lora_embedding_A"] = torch.zeros(4, 9)
        tensors[f"{Q0}.lora_C"] = torch.zeros(4, 9)

    told = inspect(edit_tensors(write_gralora(tmp_path / "a"), damage)).fits(MODULES)
    expected = [
        f"tensor {Q0}.gralora_A is missing",
        f"tensor {Q0}.gralora_B has shape [2, 8, 17], the base model needs [2, 8, 16]",
        f"tensor {Q0}.lora_magnitude_vector is surplus: the config asks for no such tensor",
        *(
            f"tensor base_model.model.{name}: the base model has no layer {name.rpartition('.')[0]} for it"
            for name in ("lm_head.gralora_A", "model.embed_tokens.weight", "model.embed_tokens.lora_embedding_A")
        ),
        f"tensor {Q0}.lora_C is not part of a LoRA or GraLoRA",
    ]

    assert sorted(expected) == sorted(told)


def test_a_target_without_tensors_is_missing(tmp_path: Path) -> None:
    """PEFT would answer with freshly initialised weights, which change nothing: a silent base-model answer."""
    path = write_gralora(tmp_path / "a", MODULES[:-1])

    told = inspect(path).fits(MODULES)

    assert [f"tensor base_model.model.{MODULES[-1].name}.gralora_{x} is missing" for x in "AB"] == told


def test_tensors_that_the_config_does_not_target_are_surplus(tmp_path: Path) -> None:
    path = write_gralora(tmp_path / "a", target_modules=["q_proj", "down_proj"])

    told = inspect(path).fits(MODULES)

    assert len(told) == 4
    assert all("target_modules does not name model.layers" in problem for problem in told)


def test_a_hybrid_s_tensors_without_a_hybrid_rank_are_surplus(tmp_path: Path) -> None:
    path = edit_config(write_gralora(tmp_path / "a", hybrid_r=4), hybrid_r=0)

    assert all("is surplus" in problem for problem in inspect(path).fits(MODULES))
    assert len(inspect(path).fits(MODULES)) == 12


def test_reading_a_hybrid_in_the_wrong_dialect_is_noticed(tmp_path: Path) -> None:
    """The tensor names are the same in both: only the shapes tell."""
    path = write_gralora(tmp_path / "a", r=8, hybrid_r=4)
    config = json.loads((path / CONFIG_FILE).read_text())
    config["gralora_alpha"] = config.pop("alpha")
    (path / CONFIG_FILE).write_text(json.dumps(config))

    assert "the base model needs [2, 16, 4]" in inspect(path).fits(MODULES)[0]


def test_an_adapter_for_another_base_model_says_for_which(tmp_path: Path) -> None:
    wider = [ModuleShape(module.name, 2 * module.in_features, module.out_features) for module in MODULES]
    path = write_gralora(tmp_path / "a", wider, base_model_name_or_path="some/other-model")

    told = inspect(path).fits(MODULES)

    assert told[0] == "it was trained for the base model 'some/other-model'"
    assert 1 + len(MODULES) == len(told)


def test_an_adapter_that_matches_nothing_says_so_first(tmp_path: Path) -> None:
    other = [ModuleShape("transformer.h.0.attn.c_attn", 32, 96)]
    path = write_lora(tmp_path / "a", other, target_modules=["c_attn"], base_model_name_or_path="gpt2")

    told = inspect(path).fits(MODULES)

    assert told[0].startswith("it matches no module of the base model: its tensors are called ")
    assert told[1] == "it was trained for the base model 'gpt2'"


def test_an_empty_checkpoint_matches_nothing(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "a", lora_config(target_modules=["nothing"]), {})

    assert inspect(path).fits(MODULES) == ["it matches no module of the base model"]


def test_widths_that_k_does_not_divide_are_refused(tmp_path: Path) -> None:
    modules = [ModuleShape("model.layers.0.self_attn.q_proj", 32, 30)]
    path = write_gralora(tmp_path / "a", [ModuleShape(modules[0].name, 32, 32)], r=8, k=4)

    assert "module model.layers.0.self_attn.q_proj [32, 30] is not divisible by k=4" in inspect(path).fits(modules)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.float8_e4m3fn, torch.complex64], ids=str)
def test_dtypes_that_are_no_weights_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    path = edit_tensors(
        write_gralora(tmp_path / "a"),
        lambda tensors: tensors.update({f"{Q0}.gralora_A": torch.zeros(2, 16, 8).to(dtype)}),
    )

    assert f"tensor {Q0}.gralora_A: dtype" in inspect(path).fits(MODULES)[0]


def test_a_long_list_of_problems_is_cut_in_the_error(tmp_path: Path) -> None:
    from gralora_runtime.adapters.checkpoint.loader import load

    path = write_checkpoint(tmp_path / "a", lora_config(), {})
    with pytest.raises(AdapterRejectedError) as caught:
        load("a", path, MODULES * 10, torch.float32, max_width=256)

    assert len(caught.value.problems) == MAX_PROBLEMS + 1
    assert caught.value.problems[-1].startswith("and ")
