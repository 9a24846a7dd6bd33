"""`gralora adapters golden`: the tokens that PEFT gives, beside the adapter's files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from support.checkpoints import write_gralora
from support.peft_adapters import gralora_config, save_adapter
from support.tiny_models import VOCAB_SIZE, save_tiny_model, tiny_model, tiny_tokenizer

from gralora_runtime.adapters.checkpoint.golden import read_golden
from gralora_runtime.adapters.checkpoint.header import GOLDEN_FILE
from gralora_server.cli.app import run
from gralora_server.cli.output import ExitCode

EOS = 1


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("golden") / "model")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """In a directory that may not name an adapter, beside one that is none."""
    (tmp_path / "beside").mkdir()
    return save_adapter(tiny_model("llama"), gralora_config("llama", 8, 2, hybrid_r=2), tmp_path / "_of mine_")


def golden(adapter: Path, model: Path, *options: str) -> int:
    return run(["adapters", "golden", str(adapter), "--model", str(model), *options])


def peft_tokens(adapter: Path, prompt: Sequence[int], count: int) -> list[int]:
    adapted = PeftModel.from_pretrained(tiny_model("llama"), adapter).eval()
    tokens = list(prompt)
    while len(tokens) < len(prompt) + count and tokens[-1] != EOS:
        with torch.no_grad():
            tokens.append(int(adapted(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def test_it_writes_what_peft_answers(model: Path, adapter: Path, capsys) -> None:
    files = {path.name for path in adapter.iterdir()}

    options = ("--prompt", "the quick", "--prompt", "stop here", "--raw", "--max-tokens", "7")
    assert golden(adapter, model, *options, "--json") == ExitCode.OK
    said = json.loads(capsys.readouterr().out)
    found = read_golden(adapter, vocab_size=VOCAB_SIZE)

    assert found is not None
    assert found.model == "model"
    assert [list(case.prompt_token_ids) for case in found.cases] == [
        tiny_tokenizer().encode(text) for text in ("the quick", "stop here")
    ]
    for case in found.cases:
        assert list(case.expected_token_ids) == peft_tokens(adapter, case.prompt_token_ids, 7)
    assert {path.name for path in adapter.iterdir()} == files | {GOLDEN_FILE}
    assert said["golden"] == {
        "model": "model",
        "cases": json.loads((adapter / GOLDEN_FILE).read_text())["cases"],
    }
    assert said["num_distinct"] == 2


def test_prompts_are_turns_of_a_conversation_and_there_are_four_of_ours(model: Path, adapter: Path, capsys) -> None:
    assert golden(adapter, model, "--max-tokens", "3") == ExitCode.OK
    found = read_golden(adapter, vocab_size=VOCAB_SIZE)

    assert found is not None
    texts = [tiny_tokenizer().decode(case.prompt_token_ids) for case in found.cases]
    assert len(texts) == 4
    assert all(text.startswith("<|start|>user\n") and text.endswith("assistant\n") for text in texts)
    assert "4 cases" in capsys.readouterr().out


def test_an_adapter_that_changes_nothing_is_told(model: Path, tmp_path: Path, capsys) -> None:
    config = gralora_config("llama", 4, 2, alpha=0)
    nothing = save_adapter(tiny_model("llama"), config, tmp_path / "nothing")

    assert golden(nothing, model, "--prompt", "the quick") == ExitCode.OK
    assert "answers 0 of them otherwise" in capsys.readouterr().out


def test_an_adapter_of_another_model_is_exit_code_4(model: Path, tmp_path: Path, capsys) -> None:
    other = write_gralora(tmp_path / "a")

    assert golden(other, model) == ExitCode.UNFIT_ADAPTER
    assert capsys.readouterr().err.startswith("error: ")
    assert not (other / GOLDEN_FILE).exists()


def test_a_prompt_that_is_too_long_leaves_the_old_record(model: Path, adapter: Path, capsys) -> None:
    (adapter / GOLDEN_FILE).write_text("old")

    assert golden(adapter, model, "--prompt", "x" * 600, "--raw") != ExitCode.OK
    assert capsys.readouterr().err.startswith("error: ")
    assert (adapter / GOLDEN_FILE).read_text() == "old"
