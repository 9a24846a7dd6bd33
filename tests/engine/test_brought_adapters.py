"""Adapter directories as trainers really leave them: each answers, token by token, what PEFT does."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from engine.test_async_engine import finish, with_engine
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support.checkpoints import edit_config, edit_tensors
from support.peft_adapters import gralora_config, lora_config, save_adapter
from support.tiny_models import VOCAB_SIZE, save_tiny_model, tiny_config, tiny_model
from support.workspaces import config_of
from torch import Tensor
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, PreTrainedModel

from gralora_runtime.adapters.checkpoint.config_keys import OPTION
from gralora_runtime.adapters.checkpoint.header import PICKLE_FILE
from gralora_runtime.adapters.checkpoint.tensors import WEIGHTS_FILE
from gralora_runtime.assemble import assemble
from gralora_runtime.async_engine import AsyncEngine
from gralora_runtime.config import EngineConfig
from gralora_runtime.errors import AdapterRejectedError
from gralora_runtime.request import GenerationRequest, Prompt, SamplingParams, StoppingParams

PROMPT = (5, 250, 17, 99, 3, 280, 41, 8, 120, 77)
NUM_TOKENS = 12
LORA = lora_config("llama", 4, alpha=24)
HYBRID = gralora_config("llama", 8, 2, hybrid_r=3, alpha=40)


def renamed(folder: Path, rename: Callable[[str], str]) -> Path:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[rename(name)] = tensors.pop(name)

    return edit_tensors(folder, change)


def without_beginning(name: str) -> str:
    return name.removeprefix("base_model.model.")


def with_own_name(name: str) -> str:
    return re.sub(r"((?:gra)?lora_[AB](?:_general)?)((?:\.weight)?)$", r"\1.default\2", name)


def inside_of_a_wrapper(name: str) -> str:
    return name.replace("base_model.model.model.", "base_model.model.language_model.model.")


# What becomes of a directory that PEFT saved. PEFT reads those that are marked; of the others it would find no tensor,
# and what it answers with the directory as it was is what counts.
READ_BY_PEFT: dict[str, Callable[[Path], Path]] = {
    "stamped": lambda folder: edit_config(folder, unsloth_fixed=True, lorap_emb_lr=1e-6),
    "future": lambda folder: edit_config(folder, a_new_switch=None, a_new_table={}, a_new_flag=False),
    "allowed": lambda folder: edit_config(folder, my_trainers_run=17),
    "heads": lambda folder: edit_config(folder, modules_to_save=["classifier", "score"]),
    "own-name": lambda folder: renamed(folder, with_own_name),
}
NOT_READ_BY_PEFT: dict[str, Callable[[Path], Path]] = {
    "no-beginning": lambda folder: renamed(folder, without_beginning),
    "both": lambda folder: renamed(folder, lambda name: with_own_name(without_beginning(name))),
    "wrapped": lambda folder: renamed(folder, inside_of_a_wrapper),
    "wrapped-no-beginning": lambda folder: renamed(folder, lambda name: without_beginning(inside_of_a_wrapper(name))),
}
PEFT_WARNS = pytest.mark.filterwarnings("ignore:Unexpected keyword arguments:UserWarning")


def greedy(model: PreTrainedModel | PeftModel) -> tuple[int, ...]:
    tokens = list(PROMPT)
    with torch.inference_mode():
        for _ in range(NUM_TOKENS):
            tokens.append(int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
    return tuple(tokens[len(PROMPT) :])


def peft_tokens(folder: Path) -> tuple[int, ...]:
    return greedy(PeftModel.from_pretrained(tiny_model("llama"), folder).eval())


def config_with(root: Path, *allowed_keys: str) -> EngineConfig:
    return config_of(root, allow_unknown_config_keys=allowed_keys, watch="off")


def asking(adapter: str) -> GenerationRequest:
    return GenerationRequest(
        request_id=f"for-{adapter}",
        prompt=Prompt(token_ids=PROMPT),
        adapter=adapter,
        sampling=SamplingParams(temperature=0.0),
        stopping=StoppingParams(max_tokens=NUM_TOKENS, ignore_eos=True),
    )


def served_tokens(config: EngineConfig, names: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Of all adapters, asked at once."""

    async def work(engine: AsyncEngine) -> dict[str, tuple[int, ...]]:
        answers = await asyncio.gather(*(finish(engine, asking(name)) for name in names))
        return {name: answer.token_ids for name, answer in zip(names, answers, strict=True)}

    return with_engine(config, work)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and its adapters as PEFT saved them and as they became: of both kinds, `KIND-CASE`."""
    root = tmp_path_factory.mktemp("brought")
    save_tiny_model("llama", root / "model")
    for kind, config in (("lora", LORA), ("hybrid", HYBRID)):
        save_adapter(tiny_model("llama"), config, root / "saved" / kind)
        for case, change in (READ_BY_PEFT | NOT_READ_BY_PEFT).items():
            change(save_adapter(tiny_model("llama"), config, root / "adapters" / f"{kind}-{case}"))
    assemble(
        config_with(root)
    ).adapters.close()  # after a change of kernels it compiles them, for longer than a test takes
    return root


@PEFT_WARNS
def test_whatever_trainers_make_of_a_directory_has_pefts_tokens(root: Path) -> None:
    kinds = ("lora", "hybrid")
    expected = {f"{kind}-{case}": peft_tokens(root / "saved" / kind) for kind in kinds for case in NOT_READ_BY_PEFT}
    expected |= {name: peft_tokens(root / "adapters" / name) for kind in kinds for name in _names(kind, READ_BY_PEFT)}

    served = served_tokens(config_with(root, "my_trainers_run"), list(expected))

    assert served == expected
    assert len({*expected.values(), greedy(tiny_model("llama"))}) == 3, "an adapter that changed nothing proves nothing"


def _names(kind: str, cases: dict[str, Callable[[Path], Path]]) -> Iterator[str]:
    return (f"{kind}-{case}" for case in cases)


def test_names_that_peft_itself_gives_its_parameters_are_read(tmp_path: Path) -> None:
    """What is saved by `torch`'s or `safetensors`' means instead of PEFT's, inside of the wrapper or of the model."""
    save_tiny_model("llama", tmp_path / "model")
    torch.manual_seed(3)
    adapted = get_peft_model(tiny_model("llama"), LORA).eval()
    for name, module in (("whole", adapted), ("inner", adapted.base_model.model)):
        adapted.save_pretrained(tmp_path / "adapters" / name)
        tensors = {key: tensor.contiguous() for key, tensor in module.state_dict().items() if "lora_" in key}
        assert not tensors.keys() & load_file(tmp_path / "adapters" / name / WEIGHTS_FILE).keys()
        save_file(tensors, tmp_path / "adapters" / name / WEIGHTS_FILE)

    served = served_tokens(config_with(tmp_path), ["whole", "inner"])

    assert served == dict.fromkeys(("whole", "inner"), greedy(adapted))


def test_an_adapter_of_a_multimodal_model_s_language_model_answers_as_it_did_there(tmp_path: Path) -> None:
    """The config's pattern speaks of paths in that model, which are others than in the one that is served."""
    llama = tiny_model("llama")
    save_tiny_model("llama", tmp_path / "model")
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=4, patch_size=2
    )
    llava = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=tiny_config("llama"), image_token_index=VOCAB_SIZE - 1)
    ).eval()
    llava.model.language_model.load_state_dict(llama.model.state_dict())
    llava.lm_head.load_state_dict(llama.lm_head.state_dict())
    torch.manual_seed(4)
    pattern = r".*language_model.*\.(q_proj|v_proj|down_proj)"
    adapted = get_peft_model(llava, lora_config("llama", 4, target_modules=pattern, alpha=24)).eval()
    adapted.save_pretrained(tmp_path / "adapters" / "seeing")
    names = load_file(tmp_path / "adapters" / "seeing" / WEIGHTS_FILE)
    assert all(".language_model." in name for name in names)

    served = served_tokens(config_with(tmp_path), ["seeing"])

    assert served == {"seeing": greedy(adapted)}
    assert greedy(adapted) != greedy(llama)


def test_peft_does_not_load_a_module_to_save_without_its_weights(tmp_path: Path) -> None:
    """So neither do we; and with null in its place, as the message says, both answer alike."""
    save_tiny_model("llama", tmp_path / "model")
    folder = edit_config(
        save_adapter(tiny_model("llama"), LORA, tmp_path / "adapters" / "lost"), modules_to_save=["lm_head"]
    )
    with pytest.raises(KeyError, match=re.escape("base_model.model.lm_head.weight")):
        PeftModel.from_pretrained(tiny_model("llama"), folder)
    with pytest.raises(AdapterRejectedError, match=r"modules_to_save: lm_head is missing: .* write null in its place"):
        served_tokens(config_with(tmp_path), ["lost"])

    edit_config(folder, modules_to_save=None)
    assert served_tokens(config_with(tmp_path), ["lost"]) == {"lost": peft_tokens(folder)}


def refusal(root: Path, name: str) -> str:
    with pytest.raises(AdapterRejectedError) as caught:
        served_tokens(config_with(root), [name])
    (problem,) = caught.value.problems
    return problem


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.filterwarnings("ignore:.* changes the base weights of the model:UserWarning")  # PEFT's, while it converts
def test_an_adapter_of_changed_base_weights_is_served_once_it_is_saved_as_the_refusal_says(
    tmp_path: Path, init: str
) -> None:
    save_tiny_model("llama", tmp_path / "model")
    trained = get_peft_model(tiny_model("llama"), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=init))
    trained.save_pretrained(tmp_path / "first")
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    expected = greedy(trained.eval())
    trained.save_pretrained(tmp_path / "adapters" / "raw")

    told = refusal(tmp_path, "raw")
    trained.save_pretrained(
        tmp_path / "adapters" / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "first")
    )

    assert told.startswith(f"init_lora_weights: {init!r} trains against changed base weights")
    assert "model.save_pretrained(OUT, path_initial_model_for_weight_conversion=FIRST)" in told
    assert served_tokens(config_with(tmp_path), ["plain"]) == {"plain": expected}
    assert expected != greedy(tiny_model("llama"))


def test_a_pickle_is_served_once_the_line_that_the_refusal_has_was_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny_model("llama", tmp_path / "model")
    folder = save_adapter(tiny_model("llama"), LORA, tmp_path / "adapters" / "old")
    torch.save(load_file(folder / WEIGHTS_FILE), folder / PICKLE_FILE)
    (folder / WEIGHTS_FILE).unlink()

    (line,) = re.findall(r"PeftModel\.\S+\(.*\)\.save_pretrained\(.*\)", refusal(tmp_path, "old"))
    monkeypatch.chdir(tmp_path / "adapters")
    eval(line, {"PeftModel": PeftModel, "base_model": tiny_model("llama")})  # it is ours

    assert served_tokens(config_with(tmp_path), ["old"]) == {"old": peft_tokens(folder)}


def test_what_was_passed_over_is_told_of_and_needs_an_operator_s_word(root: Path) -> None:
    names = ["lora-stamped", "lora-allowed", "lora-heads", "lora-future", "lora-own-name"]

    async def warnings(engine: AsyncEngine) -> dict[str, tuple[str, ...]]:
        for name in names:
            await finish(engine, asking(name))
        return {name: engine.adapters.get(name).warnings for name in names}

    told = with_engine(config_with(root, "my_trainers_run"), warnings)

    (lr, fixed), (allowed,), (heads,) = (told[name] for name in names[:3])
    assert (
        allowed
        == f"its config has my_trainers_run: 17, which is not known here and is passed over, because of {OPTION}"
    )
    assert lr.startswith("its config has lorap_emb_lr: 1e-06, the mark of the program")
    assert fixed.startswith("its config has unsloth_fixed: True, the mark of the program")
    assert heads.startswith("its config has modules_to_save: ['classifier', 'score'], which are modules of other tasks")
    assert told["lora-future"] == told["lora-own-name"] == ()
    with pytest.raises(AdapterRejectedError) as caught:
        served_tokens(config_with(root), ["lora-allowed"])
    (problem,) = caught.value.problems
    assert problem.startswith("my_trainers_run: 17 is not known here")
    assert f"({OPTION} my_trainers_run passes over it" in problem
