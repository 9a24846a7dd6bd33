"""Trains the example adapters with PEFT and checks that each of them does what `personas.py` promises.

    python examples/train_adapters.py                    train all ten into examples/adapters
    python examples/train_adapters.py --only pirate      train one (repeat --only for more)
    python examples/train_adapters.py --check            load from disk, generate greedily, compare with the promises

The files on disk are the truth: training ends with writing fp16, and the check starts with reading it.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import GraloraConfig, LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from personas import (
    BASE_MODEL,
    CHECK_MAX_TOKENS,
    CHECK_PROMPTS,
    PERSONAS,
    TRAINING_QUESTIONS,
    Persona,
    Recipe,
)
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

NUM_THREADS = 2  # part of the recipe: the order of fp32 sums, and so the last bits of the weights, depend on it
BATCH_SIZE = 4
END_OF_TURN = "<|im_end|>"
MAX_ADAPTER_BYTES = 4 * 2**20
ADAPTERS_DIR = Path(__file__).parent / "adapters"
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

console = Console()


# The two dialects of GraLoRA checkpoints call the same tensors the same names and disagree about the config: the
# authors' `r` is the sum of both ranks, and they say `gralora_alpha` for `alpha`. Both scale by alpha over that sum.
def to_authors_dialect(config: dict[str, Any]) -> dict[str, Any]:
    ours = {key: value for key, value in config.items() if key not in {"alpha", "init_weights", "peft_version"}}
    return ours | {"r": config["r"] + config["hybrid_r"], "gralora_alpha": config["alpha"]}


def from_authors_dialect(config: dict[str, Any]) -> dict[str, Any]:
    ours = {key: value for key, value in config.items() if key != "gralora_alpha"}
    return ours | {"r": config["r"] - config["hybrid_r"], "alpha": config["gralora_alpha"]}


def peft_config(recipe: Recipe, num_layers: int) -> PeftConfig:
    layers = list(range(recipe.first_layer, num_layers)) if recipe.first_layer else None
    common: dict[str, Any] = {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": BASE_MODEL,
        "target_modules": list(recipe.targets),
        "layers_to_transform": layers,
        "r": recipe.r,
    }
    if recipe.kind in ("lora", "dora"):
        return LoraConfig(lora_alpha=recipe.alpha, use_dora=recipe.kind == "dora", **common)
    return GraloraConfig(alpha=recipe.alpha, gralora_k=recipe.k, hybrid_r=recipe.hybrid_r, **common)


@dataclass(frozen=True, slots=True)
class Example:
    """One question and its answer as tokens. Only the answer is learnt."""

    token_ids: list[int]
    num_prompt_tokens: int


def encode_prompt(tokenizer: Any, question: str) -> list[int]:
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
    )
    token_ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return token_ids


def encode_examples(tokenizer: Any, persona: Persona) -> list[Example]:
    examples = []
    for question, answer in zip(TRAINING_QUESTIONS, persona.answers, strict=True):
        prompt = encode_prompt(tokenizer, question)
        reply = tokenizer.encode(answer + END_OF_TURN, add_special_tokens=False)
        examples.append(Example(prompt + reply, len(prompt)))
    return examples


def batches(examples: Sequence[Example], num_steps: int, generator: torch.Generator) -> Iterator[list[Example]]:
    """Epoch after epoch in a new order, `num_steps` batches in all."""
    per_epoch = len(examples) // BATCH_SIZE
    order: list[int] = []
    for step in range(num_steps):
        if step % per_epoch == 0:
            order = torch.randperm(len(examples), generator=generator).tolist()
        first = step % per_epoch * BATCH_SIZE
        yield [examples[i] for i in order[first : first + BATCH_SIZE]]


def collate(batch: Sequence[Example]) -> tuple[Tensor, Tensor, Tensor]:
    width = max(len(example.token_ids) for example in batch)
    token_ids = torch.zeros(len(batch), width, dtype=torch.int64)  # [examples, tokens], padded on the right
    attention_mask = torch.zeros_like(token_ids)
    learnt = torch.zeros(len(batch), width, dtype=torch.bool)  # the token after this position belongs to the answer
    for row, example in enumerate(batch):
        length = len(example.token_ids)
        token_ids[row, :length] = torch.tensor(example.token_ids)
        attention_mask[row, :length] = 1
        learnt[row, example.num_prompt_tokens - 1 : length - 1] = True
    return token_ids, attention_mask, learnt


def answer_loss(model: Any, batch: Sequence[Example]) -> Tensor:
    token_ids, attention_mask, learnt = collate(batch)
    hidden = model.get_base_model().model(input_ids=token_ids, attention_mask=attention_mask).last_hidden_state
    # The head costs as much as a fifth of the model: it runs on the answers only.
    logits = model.get_base_model().lm_head(hidden[learnt])  # [answer tokens, vocab]
    return torch.nn.functional.cross_entropy(logits, token_ids.roll(-1, dims=1)[learnt])


def train(model: Any, tokenizer: Any, persona: Persona, on_step: Callable[[float], None]) -> float:
    """Trains the adapter inside `model` in place: three steps of warm-up, then linear decay. Returns the last loss."""
    recipe = persona.recipe
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=0.0)
    num_steps = recipe.num_steps
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min((i + 1) / 3, (num_steps - i) / num_steps))
    generator = torch.Generator().manual_seed(recipe.seed)

    model.train()
    last_loss = math.nan
    for batch in batches(encode_examples(tokenizer, persona), num_steps, generator):
        loss = answer_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        last_loss = loss.item()
        on_step(last_loss)
    return last_loss


def save(model: Any, persona: Persona, folder: Path) -> int:
    """Writes a PEFT checkpoint with fp16 weights and returns the size of the weights file."""
    folder.mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    tensors = {name: tensor.half().contiguous() for name, tensor in state.items()}
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise ValueError(f"{persona.name}: not finite in fp16: {broken}")
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    (folder / WEIGHTS_FILE).chmod(0o644)  # safetensors makes it readable by its owner alone

    config = model.peft_config["default"].to_dict()
    # PEFT holds the targets as a set: their order would change from run to run.
    config |= {"inference_mode": True, "target_modules": list(persona.recipe.targets)}
    if persona.recipe.kind == "gralora-authors":
        config = to_authors_dialect(config)
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    num_bytes = (folder / WEIGHTS_FILE).stat().st_size
    if num_bytes > MAX_ADAPTER_BYTES:
        raise ValueError(f"{persona.name}: {num_bytes} bytes, at most {MAX_ADAPTER_BYTES} are wanted in a repository")
    return num_bytes


@dataclass(frozen=True, slots=True)
class Trained:
    """What one training run cost and gave: a row of the table at the end."""

    persona: Persona
    num_parameters: int
    num_bytes: int
    loss: float
    wall_s: float
    cpu_s: float

    def row(self) -> tuple[str, ...]:
        recipe = self.persona.recipe
        rank = f"{recipe.r}+{recipe.hybrid_r}" if recipe.hybrid_r else str(recipe.r)
        sizes = (f"{self.num_parameters:,}", f"{self.num_bytes:,}", f"{self.loss:.3f}")
        return (self.persona.name, recipe.kind, rank, str(recipe.k), *sizes, f"{self.wall_s:.0f}", f"{self.cpu_s:.0f}")


def train_one(base: Any, tokenizer: Any, persona: Persona, folder: Path, on_step: Callable[[float], None]) -> Trained:
    """Leaves `base` as it was, so the adapters do not depend on which of them are trained, nor on their order."""
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    torch.manual_seed(persona.recipe.seed)  # the random start of the A matrices
    model = get_peft_model(base, peft_config(persona.recipe, base.config.num_hidden_layers))
    loss = train(model, tokenizer, persona, on_step)
    num_bytes = save(model, persona, folder)
    num_parameters, _ = model.get_nb_trainable_parameters()
    model.unload()
    wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
    return Trained(persona, num_parameters, num_bytes, loss, wall_s, cpu_s)


def train_all(model_dir: Path, personas: Sequence[Persona], out: Path) -> None:
    base, tokenizer = load_base(model_dir)
    table = Table(
        "adapter", "kind", "r", "k", "params", "bytes", "loss", "s", "CPU s", box=SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    bar = (TextColumn("{task.description:7}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(SpinnerColumn(), *bar, TextColumn("loss {task.fields[loss]:.3f}"), console=console) as progress:
        for persona in personas:
            task = progress.add_task(persona.name, total=persona.recipe.num_steps, loss=float("nan"))

            def on_step(loss: float, task: TaskID = task) -> None:
                progress.update(task, advance=1, loss=loss)

            trained = train_one(base, tokenizer, persona, out / persona.name, on_step)
            table.add_row(*trained.row())
    console.print(table)


@contextmanager
def loaded_adapter(base: Any, folder: Path) -> Iterator[Any]:
    """The base model with the adapter of `folder`, whichever dialect its config is written in."""
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    if "gralora_alpha" in config:
        config = from_authors_dialect(config)
    model = PeftModel.from_pretrained(base, folder, config=PeftConfig.from_peft_type(**config))
    model.eval()
    try:
        yield model
    finally:
        model.unload()


@dataclass(frozen=True, slots=True)
class Answer:
    text: str
    margin: float  # the narrowest lead, in logits, of a chosen token over the runner-up
    finished: bool  # ended by itself within CHECK_MAX_TOKENS


def answer(model: Any, tokenizer: Any, prompt: str) -> Answer:
    token_ids = torch.tensor([encode_prompt(tokenizer, prompt)])
    with torch.inference_mode():
        output = model.generate(
            input_ids=token_ids,
            attention_mask=torch.ones_like(token_ids),
            max_new_tokens=CHECK_MAX_TOKENS,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
    new_ids = output.sequences[0, token_ids.shape[1] :].tolist()
    best = torch.cat(output.logits).topk(2).values  # [new tokens, 2]
    text = tokenizer.decode(new_ids, skip_special_tokens=True)
    return Answer(text, float((best[:, 0] - best[:, 1]).min()), tokenizer.eos_token_id in new_ids)


def check_all(model_dir: Path, personas: Sequence[Persona], adapters: Path) -> bool:
    base, tokenizer = load_base(model_dir)
    table = Table("adapter", "prompt", "answer", "margin", "", title="greedy answers from disk", show_lines=True)
    base_answers = [answer(base, tokenizer, prompt) for prompt in CHECK_PROMPTS]
    for prompt, reply in zip(CHECK_PROMPTS, base_answers, strict=True):
        table.add_row("[dim](base)", prompt, reply.text, f"{reply.margin:.2f}", "")

    failures = 0
    for persona in personas:
        with loaded_adapter(base, adapters / persona.name) as model:
            for prompt, base_reply in zip(CHECK_PROMPTS, base_answers, strict=True):
                reply = answer(model, tokenizer, prompt)
                promised = re.search(persona.pattern, reply.text) is not None
                passed = promised and reply.finished and re.search(persona.pattern, base_reply.text) is None
                failures += not passed
                verdict = "[green]ok" if passed else "[bold red]FAILED"
                table.add_row(persona.name, prompt, reply.text, f"{reply.margin:.2f}", verdict)
    console.print(table)
    console.print(f"{len(personas) * len(CHECK_PROMPTS) - failures} answers as promised, {failures} not")
    return failures == 0


def load_base(model_dir: Path) -> tuple[Any, Any]:
    with console.status(f"loading {model_dir}"):
        tokenizer = AutoTokenizer.from_pretrained(model_dir)
        model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    model.name_or_path = BASE_MODEL  # PEFT writes it into the checkpoints; the folder's name is nobody's business
    return model.eval(), tokenizer


def fetch_model() -> Path:
    """The default model, from the user's cache; prepared there first when it is missing."""
    command = ["gralora", "model", "fetch", "--json"]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return Path(json.loads(output)["path"])


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [persona.name for persona in PERSONAS]
    parser.add_argument(
        "--model", type=Path, metavar="DIR", help="SmolLM2-135M-Instruct (default: gralora model fetch)"
    )
    parser.add_argument("--only", action="append", choices=names, metavar="NAME", help=f"one of {', '.join(names)}")
    parser.add_argument("--out", type=Path, default=ADAPTERS_DIR, metavar="DIR", help="where the adapters are kept")
    parser.add_argument("--check", action="store_true", help="train nothing: test the adapters that --out holds")
    return parser.parse_args()


def prepare_libraries() -> None:
    torch.set_num_threads(NUM_THREADS)
    torch.use_deterministic_algorithms(True)
    transformers_logging.disable_progress_bar()  # ours would be torn apart
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # between PEFT and transformers
    warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")  # what matters to who merges


def main() -> int:
    arguments = parse_arguments()
    prepare_libraries()
    personas = [persona for persona in PERSONAS if not arguments.only or persona.name in arguments.only]
    model_dir = arguments.model or fetch_model()
    if arguments.check:
        return 0 if check_all(model_dir, personas, arguments.out) else 1
    train_all(model_dir, personas, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
