"""An adapter's own tokens as text: in prompts, in answers, as stop strings; the base model's tokenizer for all else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from support.larger import BOTH, NEW, answer, save_larger, save_loud, started
from support.peft_adapters import lora_config, save_adapter
from support.tiny_models import VOCAB_SIZE, save_tiny_model, tiny_model, tiny_tokenizer
from transformers import PreTrainedTokenizerFast

from gralora_runtime.adapters.checkpoint.own_tokens import TOKENIZER_FILE
from gralora_runtime.errors import AdapterRejectedError
from gralora_runtime.request import (
    ChatMessage,
    Delta,
    GenerationRequest,
    Prompt,
    ResponseParams,
    SamplingParams,
    StoppingParams,
)
from gralora_runtime.stream import merge_deltas

TEXTS = ("<tool>", " wörd ", "<end>")  # of NEW


def full_tokenizer() -> PreTrainedTokenizerFast:
    """As many tokens as the base model has rows."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<unused {at}>" for at in range(VOCAB_SIZE - len(tokenizer))])
    return tokenizer


def with_own(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The second is a special one."""
    tokenizer.add_tokens(list(TEXTS[:1]))
    tokenizer.add_tokens(list(TEXTS[1:2]), special_tokens=True)
    tokenizer.add_tokens(list(TEXTS[2:]))
    return tokenizer


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    save_tiny_model("llama", tmp_path / "model")
    full_tokenizer().save_pretrained(tmp_path / "model")
    folder = save_loud(tmp_path / "adapters" / "loud")
    with_own(full_tokenizer()).save_pretrained(folder)
    save_larger("llama", lora_config("llama", 4, **BOTH), tmp_path / "adapters" / "wordless")
    save_adapter(tiny_model("llama"), lora_config("llama", 4), tmp_path / "adapters" / "plain")
    full_tokenizer().save_pretrained(tmp_path / "adapters" / "plain")
    return tmp_path


async def answer_text(engine: Any, adapter: str, prompt: Prompt, **stopping: Any) -> Delta:
    request = GenerationRequest(
        request_id=f"{adapter} {prompt.text}",
        adapter=adapter,
        prompt=prompt,
        sampling=SamplingParams(temperature=0.0),
        stopping=StoppingParams(**{"max_tokens": 8, "ignore_eos": True} | stopping),
        response=ResponseParams(echo_prompt_token_ids=True),
    )
    return merge_deltas([delta async for delta in await engine.submit(request)])


async def test_text_in_and_out_is_of_its_own_tokens(workspace: Path) -> None:
    tokenizer = with_own(full_tokenizer())
    text = "the quick <tool> brown wörd fox<end>"
    async with started(workspace) as engine:
        found = await answer_text(engine, "loud", Prompt(text=text))
        by_ids = await answer(engine, "loud", tokenizer.encode(text))
        others = [await answer_text(engine, name, Prompt(text=text)) for name in ("", "plain", "wordless")]
        message = Prompt(messages=(ChatMessage(role="user", content="a <tool>"),))
        chat = await answer_text(engine, "loud", message)

    prompt = list(found.started.prompt_token_ids)
    assert set(NEW) <= set(prompt)
    assert prompt == tokenizer.encode(text)
    assert found.token_ids == by_ids.token_ids
    assert set(found.token_ids) & {NEW[0], NEW[2]}, "this test could not fail"
    assert found.text == by_ids.text == tokenizer.decode(found.token_ids, skip_special_tokens=True)
    assert NEW[0] in chat.started.prompt_token_ids
    for other in others:
        assert list(other.started.prompt_token_ids) == full_tokenizer().encode(text)


async def test_a_stop_string_is_found_in_them(workspace: Path) -> None:
    async with started(workspace) as engine:
        whole = await answer_text(engine, "loud", Prompt(text="the <tool>"))
        stop = next(
            text for text, token in zip(TEXTS, NEW, strict=True) if token in whole.token_ids and text in whole.text
        )
        found = await answer_text(engine, "loud", Prompt(text="the <tool>"), stop=(stop,))

    assert found.finished.stop_string == stop
    assert found.text == whole.text[: whole.text.index(stop)]


async def test_without_a_tokenizer_added_tokens_are_no_text(workspace: Path) -> None:
    async with started(workspace) as engine:
        found = await answer(engine, "wordless", [5, *NEW])

    assert found.text == full_tokenizer().decode([token for token in found.token_ids if token < VOCAB_SIZE])


async def test_rows_that_the_base_model_has_to_spare_get_texts_too(tmp_path: Path) -> None:
    """The tokenizer was extended and the model was not resized, because it is padded."""
    save_tiny_model("llama", tmp_path / "model")
    known = len(tiny_tokenizer())
    config = lora_config("llama", 4, target_modules=["q_proj"], trainable_token_indices=[known, known + 2])
    folder = save_adapter(tiny_model("llama"), config, tmp_path / "adapters" / "padded")
    with_own(tiny_tokenizer()).save_pretrained(folder)
    async with started(tmp_path) as engine:
        found = await answer_text(engine, "padded", Prompt(text="a<tool>b"))

    assert list(found.started.prompt_token_ids) == with_own(tiny_tokenizer()).encode("a<tool>b")
    assert known in found.started.prompt_token_ids


def _edit(folder: Path, **changes: object) -> None:
    path = folder / TOKENIZER_FILE
    document = json.loads(path.read_text())
    (own,) = (token for token in document["added_tokens"] if token["id"] == NEW[1])
    own.update(changes)
    path.write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"id": NEW[2] + 1}, "do not follow the base model's 320 tokens"),
        ({"id": "x"}, "is no token with an id"),
        ({"content": ""}, "is no text of 1 to 1024 characters"),
        ({"special": 1}, "flags that are neither true nor false"),
    ],
    ids=["a gap", "no id", "no text", "a flag"],
)
async def test_a_tokenizer_that_does_not_fit_is_refused(
    workspace: Path, changes: Mapping[str, object], told: str
) -> None:
    _edit(workspace / "adapters" / "loud", **changes)
    async with started(workspace) as engine:
        with pytest.raises(AdapterRejectedError, match=told):
            await answer(engine, "loud")


@pytest.mark.parametrize("text", ["<tool>", "the", "<|end|>"], ids=["its own", "a word", "a special one"])
async def test_a_text_that_another_token_has_is_refused(workspace: Path, text: str) -> None:
    _edit(workspace / "adapters" / "loud", content=text)
    async with started(workspace) as engine:
        with pytest.raises(AdapterRejectedError, match="its token 321 has a text that another token has"):
            await answer(engine, "loud")
        assert engine.load().adapter_leases == 0


async def test_more_texts_than_rows_are_refused(workspace: Path) -> None:
    tokenizer = with_own(full_tokenizer())
    tokenizer.add_tokens(["<one more>"])
    tokenizer.save_pretrained(workspace / "adapters" / "loud")
    async with started(workspace) as engine:
        with pytest.raises(AdapterRejectedError, match="there is no row for its token 323"):
            await answer(engine, "loud")


async def test_other_texts_are_another_content(workspace: Path) -> None:
    async with started(workspace) as engine:
        before = (await answer(engine, "loud")).started.adapter_digest
    _edit(workspace / "adapters" / "loud", content="<other>")
    async with started(workspace) as engine:
        after = (await answer(engine, "loud")).started.adapter_digest

    assert before != after


async def test_a_copy_of_an_old_version_has_its_texts(workspace: Path, tmp_path: Path) -> None:
    folder, prompt = workspace / "adapters" / "loud", Prompt(text="the <tool>")
    async with started(workspace, state_dir=tmp_path / "state", watch="off") as engine:
        first = await answer_text(engine, "loud", prompt)
        _edit(folder, content="<other>")
        engine.adapters.load("loud").result(30)
    async with started(workspace, state_dir=tmp_path / "state", watch="off") as engine:
        again = await answer_text(engine, "loud@1", prompt)

    assert again.started.adapter_digest == first.started.adapter_digest
    assert (again.text, again.started.prompt_token_ids) == (first.text, first.started.prompt_token_ids)
