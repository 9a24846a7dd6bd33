"""Activated adapters: PEFT's tokens from the invocation on, the base model's and its pages before it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.activated import KEY, adapted, last_place
from support.checkpoints import edit_config
from support.peft_adapters import gralora_config, lora_config
from support.tiny_models import tiny_model
from support.workspaces import config_of, save_workspace

from gralora_runtime.adapters.checkpoint.golden import Golden, GoldenCase, write_golden
from gralora_runtime.async_engine import AsyncEngine
from gralora_runtime.config import EngineConfig, in_directory
from gralora_runtime.errors import AdapterRejectedError
from gralora_runtime.request import Delta, GenerationRequest, Prompt, SamplingParams, StoppingParams
from gralora_runtime.stream import merge_deltas

INVOCATION = [7, 8, 9]
LOUD = 200  # alpha: one page of such an adapter would show in any answer
CONFIGS = {
    "lora": lora_config("llama", 6, alpha=LOUD, alora_invocation_tokens=INVOCATION),
    "gralora": gralora_config("llama", 8, 2, hybrid_r=3, alpha=LOUD, alora_invocation_tokens=INVOCATION),
    "other": lora_config("llama", 4, alpha=LOUD, alora_invocation_tokens=[8, 9]),
    "plain": lora_config("llama", 5, alpha=LOUD),
}
ACTIVATED = ("lora", "gralora", "other")
PAGE = 4
TEXT = [(37 * at) % 290 + 10 for at in range(30)]  # without any of them
# By where the last invocation is: page 4 begins with it, it begins inside of page 4, and so on.
PROMPTS = {
    "at-a-page": TEXT[:16] + INVOCATION + TEXT[16:25],
    "inside-a-page": TEXT[:18] + INVOCATION + TEXT[18:25],
    "first": INVOCATION + TEXT[:20],
    "last": TEXT[:21] + INVOCATION,
    "several": TEXT[:6] + INVOCATION + TEXT[6:15] + INVOCATION + TEXT[15:20],
    "broken-off": TEXT[:10] + INVOCATION + TEXT[10:20] + INVOCATION[:2],
    "absent": TEXT[:23] + INVOCATION[:2] + TEXT[23:26],
}
NUM_TOKENS = 10


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_workspace(tmp_path_factory.mktemp("activated"), CONFIGS)


@pytest.fixture
def config(workspace: Path) -> EngineConfig:
    return config_of(workspace, max_num_batched_tokens=512, page_size=PAGE)


@pytest.fixture(scope="module")
def expected(workspace: Path) -> dict[tuple[str, str], tuple[int, ...]]:
    """PEFT's greedy tokens, and the base model's, by adapter and prompt."""
    found = {}
    for where, prompt in PROMPTS.items():
        found["", where] = greedily(tiny_model("llama"), prompt)
        for name in CONFIGS:
            with adapted(tiny_model("llama"), workspace / "adapters" / name, prompt) as model:
                # Only PEFT's own way to generate keeps an aLoRA on in tokens that come after the prompt.
                found[name, where] = (greedily if name == "gralora" else generated)(model, prompt)
    return found


@torch.inference_mode()
def greedily(model: torch.nn.Module, prompt: Sequence[int]) -> tuple[int, ...]:
    tokens = list(prompt)
    for _ in range(NUM_TOKENS):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tuple(tokens[len(prompt) :])


def generated(model: torch.nn.Module, prompt: Sequence[int]) -> tuple[int, ...]:
    ids = torch.tensor([prompt])
    answer = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        min_new_tokens=NUM_TOKENS,
        max_new_tokens=NUM_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=2,
    )
    return tuple(answer[0, len(prompt) :].tolist())


@contextmanager
def engine_of(config: EngineConfig) -> Iterator[tuple[AsyncEngine, asyncio.Runner]]:
    with asyncio.Runner() as runner:
        engine = runner.run(AsyncEngine.start(config))
        try:
            yield engine, runner
            engine.adapters.check_integrity()
            engine._parts.engine.scheduler.check_integrity()
        finally:
            runner.run(engine.close())


async def ask(
    engine: AsyncEngine,
    adapter: str,
    prompt: Sequence[int],
    *,
    num_tokens: int = NUM_TOKENS,
    logit_bias: Mapping[int, float] | None = None,
    **scopes: str,
) -> Delta:
    request = GenerationRequest(
        request_id=f"{adapter}-{hash(tuple(prompt))}",
        prompt=Prompt(token_ids=tuple(prompt)),
        adapter=adapter,
        sampling=SamplingParams(temperature=0.0, logit_bias=logit_bias or {}),
        stopping=StoppingParams(max_tokens=num_tokens, ignore_eos=True),
        **scopes,
    )
    return merge_deltas([delta async for delta in await engine.submit(request)])


async def ask_all(engine: AsyncEngine) -> dict[tuple[str, str], tuple[int, ...]]:
    """Each adapter and the base model, with each prompt, at once."""
    asked = [(name, where) for name in ("", *CONFIGS) for where in PROMPTS]
    answers = await asyncio.gather(*(ask(engine, name, PROMPTS[where]) for name, where in asked))
    return {key: answer.token_ids for key, answer in zip(asked, answers, strict=True)}


def cached(answer: Delta) -> int:
    assert answer.started is not None
    return answer.started.cached_tokens


def test_the_prompts_are_what_they_are_called(expected: dict[tuple[str, str], tuple[int, ...]]) -> None:
    places = {where: last_place(INVOCATION, prompt) for where, prompt in PROMPTS.items()}

    assert places == {
        "at-a-page": 16, "inside-a-page": 18, "first": 0, "last": 21, "several": 18, "broken-off": 10, "absent": None
    }  # fmt: skip
    for where in PROMPTS:
        alike = {"lora": expected["", where], "gralora": expected["", where], "plain": ()}
        for name, base in alike.items():
            assert (expected[name, where] == base) == (where == "absent" and name != "plain"), (name, where)


@pytest.mark.parametrize("num_batched", [512, 12, 16, 17], ids=lambda n: f"{n}-tokens-a-step")
def test_tokens_are_pefts_in_one_batch_and_wherever_a_prompt_is_cut(
    config: EngineConfig, expected: dict[tuple[str, str], tuple[int, ...]], num_batched: int
) -> None:
    """Chunks end before, at and inside of an invocation. Whoever comes second finds pages of the others."""
    config = replace(config, max_num_batched_tokens=num_batched, max_num_seqs=min(32, num_batched))
    with engine_of(config) as (engine, runner):
        first, again = runner.run(ask_all(engine)), runner.run(ask_all(engine))

    assert first == expected
    assert again == expected


def test_who_gives_way_is_computed_again_with_the_same_tokens(
    config: EngineConfig, expected: dict[tuple[str, str], tuple[int, ...]]
) -> None:
    cramped = replace(config, kv_cache_bytes=96 << 10, max_model_len=64)
    with engine_of(cramped) as (engine, runner):
        found = runner.run(ask_all(engine))
        preemptions = engine.load().preemptions

    assert preemptions > 0, "nobody was preempted: this test would not notice"
    assert found == expected


@pytest.mark.parametrize("where", ["at-a-page", "inside-a-page", "several"])
@pytest.mark.parametrize("name", ACTIVATED)
def test_what_is_before_an_invocation_is_the_base_models_page_and_nothing_after_it(
    config: EngineConfig, expected: dict[tuple[str, str], tuple[int, ...]], name: str, where: str
) -> None:
    """Either may be first: the other finds all pages that end before the place, and none that goes beyond it."""
    prompt = PROMPTS[where]
    place = last_place(CONFIGS[name].alora_invocation_tokens, prompt)
    whole_pages = place // PAGE * PAGE
    for first, second in (("", name), (name, "")):
        with engine_of(config) as (engine, runner):
            before = runner.run(ask(engine, first, prompt))
            after = runner.run(ask(engine, second, prompt))
            repeated = runner.run(ask(engine, second, prompt))

        assert [cached(before), cached(after)] == [0, whole_pages]
        assert cached(repeated) == (len(prompt) - 1) // PAGE * PAGE
        assert before.token_ids == expected[first, where]
        assert after.token_ids == repeated.token_ids == expected[second, where]


def test_activated_adapters_share_what_is_before_them_with_one_another_and_not_with_others(
    config: EngineConfig, expected: dict[tuple[str, str], tuple[int, ...]]
) -> None:
    with engine_of(config) as (engine, runner):
        answers = {
            name: runner.run(ask(engine, name, PROMPTS["inside-a-page"])) for name in ("lora", "gralora", "plain")
        }

    assert {name: cached(answer) for name, answer in answers.items()} == {"lora": 0, "gralora": 16, "plain": 0}
    for name, answer in answers.items():
        assert answer.token_ids == expected[name, "inside-a-page"]


@pytest.mark.parametrize("shared", [1, 2, 3], ids=lambda n: f"{n}-tokens-before-it-in-its-page")
def test_the_same_tokens_invoked_at_another_place_are_other_pages(
    config: EngineConfig, workspace: Path, shared: int
) -> None:
    """The first prompt's page is the adapter's from its first invocation on; in the second one that is text."""
    early = TEXT[: 8 + shared] + INVOCATION + TEXT[11:20]
    late = early + INVOCATION + TEXT[20:22]
    with adapted(tiny_model("llama"), workspace / "adapters" / "lora", late) as model:
        expected = generated(model, late)
    for first, second, found in ((early, late, 8), (late, early, 8)):
        with engine_of(config) as (engine, runner):
            alone = runner.run(ask(engine, "lora", first))
            answer = runner.run(ask(engine, "lora", second))
            if second is late:
                assert answer.token_ids == expected

        assert [cached(alone), cached(answer)] == [0, found]


def test_one_page_s_tokens_are_another_page_where_the_invocation_is_later_in_it(
    config: EngineConfig, tmp_path: Path
) -> None:
    """An answer may spell the invocation. In a prompt that repeats that answer it is one, and all before it text."""
    save_workspace(tmp_path, {"bell": lora_config("llama", 6, alpha=LOUD, alora_invocation_tokens=[7])})
    asked = [*TEXT[:4], 7, *TEXT[4:9]]
    with engine_of(replace(config, adapters=in_directory(tmp_path / "adapters"), page_size=16)) as (engine, runner):
        told = runner.run(ask(engine, "bell", asked, num_tokens=8, logit_bias={7: 1000.0})).token_ids
        assert told == (7,) * 8
        repeated = [*asked, *told][:16] + TEXT[9:12]
        assert (last_place([7], asked), last_place([7], repeated)) == (4, 15)
        answer = runner.run(ask(engine, "bell", repeated))
    with adapted(tiny_model("llama"), tmp_path / "adapters" / "bell", repeated) as model:
        expected = generated(model, repeated)

    assert answer.token_ids == expected
    assert cached(answer) == 0


def test_a_prefix_is_shared_in_the_base_models_scope_whatever_the_adapters_is(config: EngineConfig) -> None:
    """Tenants share the prefixes of an adapter that is everybody's, and those of the base model with nobody."""
    prompt, whole = PROMPTS["inside-a-page"], 24
    with engine_of(config) as (engine, runner):
        base = runner.run(ask(engine, "", prompt, prefix_scope="acme"))
        own = runner.run(ask(engine, "lora", prompt, base_prefix_scope="acme"))
        others = runner.run(ask(engine, "lora", prompt, base_prefix_scope="other"))
        plain = [runner.run(ask(engine, "plain", prompt, base_prefix_scope=name)) for name in ("acme", "other")]

    assert [cached(answer) for answer in (base, own, others, *plain)] == [0, 16, 0, 0, whole]


def test_a_second_turn_finds_the_first_one_s_answer(config: EngineConfig, workspace: Path) -> None:
    """Pages that answers filled are the adapter's, as long as the invocation is where it was."""
    prompt = PROMPTS["inside-a-page"]
    with engine_of(config) as (engine, runner):
        first = runner.run(ask(engine, "lora", prompt))
        both = [*prompt, *first.token_ids, *TEXT[:6]]
        assert last_place(INVOCATION, both) == 18, "the answer has an invocation: choose another seed"
        second = runner.run(ask(engine, "lora", both))
        of_base = runner.run(ask(engine, "", both))
    with adapted(tiny_model("llama"), workspace / "adapters" / "lora", both) as model:
        expected = generated(model, both)

    assert second.token_ids == expected
    assert cached(second) >= len(prompt)
    assert cached(of_base) == 16


def test_a_request_that_does_not_invoke_its_adapter_is_the_base_models(
    config: EngineConfig, expected: dict[tuple[str, str], tuple[int, ...]], caplog: pytest.LogCaptureFixture
) -> None:
    """All of its pages, too; and it says who was asked."""
    caplog.set_level(logging.DEBUG, "gralora_runtime.async_engine")
    with engine_of(config) as (engine, runner):
        base = runner.run(ask(engine, "", PROMPTS["absent"]))
        answer = runner.run(ask(engine, "lora", PROMPTS["absent"]))

    assert answer.token_ids == base.token_ids == expected["", "absent"]
    assert cached(answer) == (len(PROMPTS["absent"]) - 1) // PAGE * PAGE
    assert answer.started is not None
    assert answer.started.adapter == "lora"
    assert answer.started.adapter_digest
    assert [record.args[-1] for record in caplog.records if "is not invoked" in record.message] == ["lora"]


def test_the_same_weights_with_another_invocation_are_another_adapter(config: EngineConfig, tmp_path: Path) -> None:
    save_workspace(tmp_path, {"a": CONFIGS["lora"], "b": CONFIGS["lora"]})
    weights = (tmp_path / "adapters" / "a" / "adapter_model.safetensors").read_bytes()
    (tmp_path / "adapters" / "b" / "adapter_model.safetensors").write_bytes(weights)
    edit_config(tmp_path / "adapters" / "b", **{KEY: TEXT[4:6]})
    prompt = PROMPTS["last"]
    with engine_of(replace(config, adapters=in_directory(tmp_path / "adapters"))) as (engine, runner):
        a, b = (runner.run(ask(engine, name, prompt)) for name in "ab")
    with adapted(tiny_model("llama"), tmp_path / "adapters" / "b", prompt) as model:
        expected = generated(model, prompt)

    assert a.started is not None
    assert b.started is not None
    assert a.started.adapter_digest != b.started.adapter_digest
    assert cached(b) == 4
    assert b.token_ids == expected != a.token_ids


@pytest.mark.parametrize("made_with", [INVOCATION, None], ids=["activated", "on-all-tokens"])
def test_golden_prompts_are_answered_as_requests_are(
    config: EngineConfig, tmp_path: Path, made_with: list[int] | None
) -> None:
    save_workspace(tmp_path, {"a": CONFIGS["lora"]})
    folder, prompt = edit_config(tmp_path / "adapters" / "a", **{KEY: made_with}), PROMPTS["inside-a-page"]
    with adapted(tiny_model("llama"), folder, prompt) as model:
        answer = generated(model, prompt)
    edit_config(folder, **{KEY: INVOCATION})
    golden = Golden(model="", cases=(GoldenCase(prompt_token_ids=tuple(prompt), expected_token_ids=answer),))
    write_golden(folder, golden, vocab_size=320)
    refused = nullcontext() if made_with else pytest.raises(AdapterRejectedError, match=r"golden\.json: cases\[0\]")
    with engine_of(replace(config, adapters=in_directory(tmp_path / "adapters"))) as (engine, runner), refused:
        assert runner.run(ask(engine, "a", prompt)).token_ids == answer


def test_an_invocation_that_the_model_has_no_tokens_for_is_refused(config: EngineConfig, tmp_path: Path) -> None:
    save_workspace(tmp_path, {"a": CONFIGS["lora"]})
    edit_config(tmp_path / "adapters" / "a", **{KEY: [7, 320]})
    config = replace(config, adapters=in_directory(tmp_path / "adapters"))
    with engine_of(config) as (engine, runner), pytest.raises(AdapterRejectedError) as caught:
        runner.run(ask(engine, "a", TEXT))

    assert caught.value.problems == ("alora_invocation_tokens[1]: 320 is not a token id of this model (0 to 319)",)
