"""Weights of an embedding, an output head and norms that stand in the place of the base model's, as they are loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from support.checkpoints import MODULES, edit_tensors, write_gralora, write_lora
from torch import Tensor

from gralora_kernels.alignment import map_numel
from gralora_kernels.packing import ROW_MAJOR, Array, Packing
from gralora_runtime.adapters.checkpoint import rows as rows_module
from gralora_runtime.adapters.checkpoint.affine import BaseNorm
from gralora_runtime.adapters.checkpoint.conversion import convert
from gralora_runtime.adapters.checkpoint.difference import difference
from gralora_runtime.adapters.checkpoint.doubts import CHANGES_NOTHING
from gralora_runtime.adapters.checkpoint.header import inspect
from gralora_runtime.adapters.checkpoint.loader import LoadedAdapter, load
from gralora_runtime.adapters.checkpoint.mixture import Ingredient, mixed
from gralora_runtime.adapters.checkpoint.spec import Dialect, LayerKind, ModuleShape
from gralora_runtime.adapters.checkpoint.unpacking import updates_in
from gralora_runtime.adapters.checkpoint.update import dense
from gralora_runtime.adapters.checkpoint.whole import read_whole
from gralora_runtime.adapters.oddities import Oddities
from gralora_runtime.errors import AdapterConversionError, AdapterRejectedError

VOCAB, HIDDEN = 41, 32
EMBEDDING = ModuleShape("model.embed_tokens", VOCAB, HIDDEN, kind=LayerKind.EMBEDDING)
HEAD = ModuleShape("lm_head", HIDDEN, VOCAB, has_bias=True, kind=LayerKind.HEAD)
NORM = ModuleShape("model.norm", HIDDEN, HIDDEN, has_bias=True, kind=LayerKind.NORM)
MODEL = (*MODULES, HEAD, EMBEDDING, NORM)
TIED = (*MODULES, replace(HEAD, tied_to=EMBEDDING.name), EMBEDDING, NORM)
PREFIX = "base_model.model."
PACKINGS = {"rows": ROW_MAJOR, "panels": Packing(panel=16, keeps_16_bit=True)}


class Base:
    """Weights that are known."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(4)
        self.head = torch.randn(VOCAB, HIDDEN, generator=generator)
        self.embedding = torch.randn(VOCAB, HIDDEN, generator=generator)

    def bias(self, module: str) -> Array | None:
        return torch.ones(VOCAB).numpy() if module == HEAD.name else None

    def factor(self, _module: str) -> float:
        return 1.0

    def norms(self, module: str, _a: Array, _b: Array) -> Array:
        raise AssertionError(module)

    def norm(self, _module: str) -> BaseNorm:
        return BaseNorm(torch.full((HIDDEN,), 3.0).numpy(), torch.zeros(HIDDEN).numpy(), offset=1.0, factor=2.0)

    def rows(self, module: str, first: int, count: int) -> Array:
        weight = self.head if module == HEAD.name else self.embedding
        return weight[first : first + count].numpy()


BASE = Base()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def saved(seed: int = 0) -> dict[str, Tensor]:
    """Tensors of modules_to_save: ["embed_tokens", "lm_head", "norm"]."""
    return {
        f"{PREFIX}model.embed_tokens.weight": random(VOCAB, HIDDEN, seed=seed),
        f"{PREFIX}lm_head.weight": random(VOCAB, HIDDEN, seed=seed + 1),
        f"{PREFIX}lm_head.bias": random(VOCAB, seed=seed + 2),
        f"{PREFIX}model.norm.weight": random(HIDDEN, seed=seed + 3),
        f"{PREFIX}model.norm.bias": random(HIDDEN, seed=seed + 4),
    }


def write_saved(folder: Path, change: Callable[[dict[str, Tensor]], object] = lambda _: None, seed: int = 0) -> Path:
    path = write_lora(folder, modules_to_save=["embed_tokens", "lm_head", "norm"])
    edit_tensors(path, lambda tensors: tensors.update(saved(seed)))
    return edit_tensors(path, lambda tensors: (change(tensors), None)[1])


def token_rows(module: str) -> str:
    return f"{PREFIX}{module}.token_adapter.trainable_tokens_delta"


def write_tokens(folder: Path, tokens: list[int], *, seed: int = 0) -> Path:
    path = write_lora(folder, trainable_token_indices=tokens)
    rows = random(len(tokens), HIDDEN, seed=seed)
    return edit_tensors(path, lambda tensors: tensors.update({token_rows("model.embed_tokens"): rows}))


def loaded(
    path: Path,
    modules: tuple[ModuleShape, ...] = MODEL,
    dtype: torch.dtype = torch.float32,
    packing: Packing = ROW_MAJOR,
) -> LoadedAdapter:
    return load(path.name, path, modules, dtype, max_width=64, base=BASE, packing=packing)


def head_of(adapter: LoadedAdapter, packing: Packing) -> Tensor:
    """The output head's weight with the adapter."""
    (pair,) = updates_in(adapter, MODEL, packing)[HEAD.name]
    return BASE.head + dense(pair)


def embedding_of(adapter: LoadedAdapter) -> Tensor:
    """The embedding's rows with the adapter, as kernels find them."""
    start = dict(adapter.layout.affines)[EMBEDDING.name]
    row_of = adapter.blob[start:].view(torch.int32)[:VOCAB]
    rows = adapter.blob[start + map_numel(VOCAB, adapter.blob.itemsize) :].float()
    weight = BASE.embedding.clone()
    for token, row in enumerate(row_of.tolist()):
        if row:
            weight[token] = rows[(row - 1) * HIDDEN :][:HIDDEN]
    return weight


@pytest.mark.parametrize("piece_bytes", [256, 4 << 20], ids=["many pieces", "one piece"])
@pytest.mark.parametrize("packing", PACKINGS.values(), ids=PACKINGS)
def test_whole_weights_are_what_the_checkpoint_has(
    tmp_path: Path, packing: Packing, piece_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows_module, "PIECE_BYTES", piece_bytes)
    adapter = loaded(write_saved(tmp_path / "a"), packing=packing)
    own = saved()

    torch.testing.assert_close(head_of(adapter, packing), own[f"{PREFIX}lm_head.weight"])
    assert torch.equal(embedding_of(adapter), own[f"{PREFIX}model.embed_tokens.weight"])
    gains, shifts = adapter.blob[dict(adapter.layout.affines)[NORM.name] :][: 2 * HIDDEN].view(2, -1)
    torch.testing.assert_close(gains, 2 * (own[f"{PREFIX}model.norm.weight"] + 1))
    torch.testing.assert_close(shifts, 2 * own[f"{PREFIX}model.norm.bias"])
    assert adapter.layout.summary.replaces == (HEAD.name, EMBEDDING.name, NORM.name)
    assert adapter.layout.width == 4, "the head's own rank is no concern of the layers"


@pytest.mark.parametrize("packing", PACKINGS.values(), ids=PACKINGS)
@pytest.mark.parametrize("tokens", [[40], [7, 0, 16], list(range(36))[::-1]], ids=["one", "some", "more than hidden"])
def test_rows_of_tokens_are_of_both_ends_where_those_are_tied(
    tmp_path: Path, tokens: list[int], packing: Packing
) -> None:
    path = write_tokens(tmp_path / "a", tokens)
    rows = random(len(tokens), HIDDEN)
    adapter = loaded(path, TIED, packing=packing)

    for weight, base in ((head_of(adapter, packing), BASE.head), (embedding_of(adapter), BASE.embedding)):
        expected = base.clone()
        expected[tokens] = rows
        torch.testing.assert_close(weight, expected)
    assert HEAD.name not in dict(loaded(path).layout.modules), "it is not tied"
    (head,) = dict(adapter.layout.modules)[HEAD.name]
    assert head.r == min(len(tokens), HIDDEN)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=["in 32", "in 16"])
def test_what_they_take_is_known_before_they_are_read(tmp_path: Path, dtype: torch.dtype, stored: torch.dtype) -> None:
    path = write_saved(tmp_path / "a", lambda t: t.update({name: value.to(stored) for name, value in t.items()}))
    adapter = loaded(path, dtype=dtype)

    assert adapter.layout.summary.packed_numel == adapter.layout.numel == len(adapter.blob)
    assert inspect(path).cpu_pool_bytes(MODEL) == 4 * loaded(path, packing=PACKINGS["panels"]).layout.numel
    tolerance = 0.0 if dtype == torch.float32 else 2e-2
    own = saved()[f"{PREFIX}model.embed_tokens.weight"].to(stored).float()
    torch.testing.assert_close(embedding_of(adapter), own, rtol=tolerance, atol=tolerance)


def test_whatever_they_say_changes_the_digest_and_how_they_lie_does_not(tmp_path: Path) -> None:
    paths = [
        write_saved(tmp_path / "saved"),
        write_saved(tmp_path / "other", seed=9),
        write_saved(tmp_path / "norm", lambda t: t[f"{PREFIX}model.norm.bias"].add_(1)),
        write_saved(tmp_path / "row", lambda t: t[f"{PREFIX}lm_head.weight"][40, 31].add_(1)),
        write_tokens(tmp_path / "tokens", [3, 4]),
        write_tokens(tmp_path / "others", [4, 3]),
        write_lora(tmp_path / "plain"),
    ]
    digests = [loaded(path).digest for path in paths]

    assert len(set(digests)) == len(paths)
    assert loaded(paths[4], TIED).digest not in digests
    for path, digest in zip(paths, digests, strict=True):
        assert loaded(path, packing=PACKINGS["panels"], dtype=torch.float32).digest == digest
        assert read_whole(path, MODEL).digest == digest


def test_a_pair_on_the_embedding_reads_ids_and_its_copy_has_to_be_the_base_s(tmp_path: Path) -> None:
    """As PEFT saves it, copy included."""
    pair = {"lora_embedding_A": random(4, VOCAB), "lora_embedding_B": random(HIDDEN, 4, seed=1)}
    path = write_lora(tmp_path / "a", target_modules=["q_proj", "v_proj", "down_proj", "embed_tokens"])
    name = f"{PREFIX}model.embed_tokens"
    edit_tensors(path, lambda t: t.update({f"{name}.{key}": value for key, value in pair.items()}))
    (update,) = updates_in(loaded(path), MODEL)[EMBEDDING.name]
    torch.testing.assert_close(dense(update), 4.0 * pair["lora_embedding_B"] @ pair["lora_embedding_A"])

    digest = loaded(path).digest
    edit_tensors(path, lambda t: t.update({f"{name}.base_layer.weight": BASE.embedding.clone()}))
    assert loaded(path).digest == digest
    edit_tensors(path, lambda t: t.update({f"{name}.base_layer.weight": BASE.embedding + 1}))
    with pytest.raises(AdapterRejectedError, match=r"embed_tokens.base_layer.weight is not the base model's weight"):
        loaded(path)


def test_embeddings_that_were_saved_untrained_are_accepted_if_they_are_the_base_s(tmp_path: Path) -> None:
    """As `save_embedding_layers=True` has it."""
    copies = {f"{PREFIX}model.embed_tokens.weight": BASE.embedding, f"{PREFIX}lm_head.weight": BASE.head.clone()}
    path = edit_tensors(write_lora(tmp_path / "a"), lambda t: t.update(copies))

    assert loaded(path).digest == loaded(write_lora(tmp_path / "b")).digest
    copies[f"{PREFIX}lm_head.weight"][0, 0] += 1
    with pytest.raises(AdapterRejectedError, match=r"lm_head.weight is not the base model's weight"):
        loaded(edit_tensors(path, lambda t: t.update(copies)))


BROKEN = {
    "no weights": (lambda t: [t.pop(name) for name in saved()], "modules_to_save: lm_head is missing: its trained"),
    "no bias": (lambda t: t.pop(f"{PREFIX}lm_head.bias"), f"tensor {PREFIX}lm_head.bias is missing"),
    "other vocabulary": (
        lambda t: t.update({f"{PREFIX}lm_head.weight": torch.zeros(VOCAB + 1, HIDDEN)}),
        "lm_head.weight has shape [42, 32], the base model needs [41, 32]",
    ),
    "not finite": (
        lambda t: t[f"{PREFIX}model.embed_tokens.weight"].fill_(torch.inf),
        "embed_tokens.weight has values that are not finite in float32",
    ),
    "a norm that is not": (
        lambda t: t[f"{PREFIX}model.norm.weight"].fill_(torch.nan),
        "module model.norm: its trained biases and weights of norms make no finite numbers",
    ),
    "of another": (lambda t: t.update({f"{PREFIX}model.other.weight": torch.zeros(3)}), "no layer model.other for it"),
}


@pytest.mark.parametrize(("change", "told"), BROKEN.values(), ids=BROKEN)
def test_what_is_wrong_with_whole_weights_is_told(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], object], told: str
) -> None:
    with pytest.raises(AdapterRejectedError) as caught:
        loaded(write_saved(tmp_path / "a", change))

    assert told in str(caught.value)


def test_rows_that_a_pool_of_16_bits_does_not_hold_are_told(tmp_path: Path) -> None:
    path = write_saved(tmp_path / "a", lambda t: t[f"{PREFIX}lm_head.weight"].fill_(1e5))

    with pytest.raises(AdapterRejectedError, match="trained rows have values that are not finite in float16"):
        loaded(path, dtype=torch.float16)


UNSERVED = {
    "a whole linear layer": (
        lambda folder: write_lora(folder, modules_to_save=["v_proj"], target_modules=["q_proj"]),
        "module model.layers.0.self_attn.v_proj: trained as a whole, it is not served: of whole modules, embeddings",
    ),
    "a token beyond": (
        lambda folder: write_tokens(folder, [5, VOCAB]),
        "module model.embed_tokens: 41 is not a token id of this model (0 to 40)",
    ),
    "rows beside a pair": (
        lambda folder: write_lora(folder, target_modules=["embed_tokens"], trainable_token_indices=[3]),
        "module model.embed_tokens: a low-rank pair beside trained rows of the same embedding is not served",
    ),
    "blocks": (
        lambda folder: write_gralora(folder, target_modules=["q_proj", "embed_tokens"]),
        "module model.embed_tokens: blocks on an embedding are not served, as PEFT has none",
    ),
    "dora": (
        lambda folder: write_lora(folder, target_modules=["embed_tokens"], use_dora=True),
        "module model.embed_tokens: on an embedding nothing but a plain LoRA is served",
    ),
    "tied pairs": (
        lambda folder: write_lora(folder, target_modules=["embed_tokens"], ensure_weight_tying=True),
        "module model.embed_tokens: a low-rank pair that is tied (ensure_weight_tying) is not served",
    ),
}


@pytest.mark.parametrize(("write", "told"), UNSERVED.values(), ids=UNSERVED)
def test_what_is_not_served_is_said_with_its_module(tmp_path: Path, write: Callable[[Path], Path], told: str) -> None:
    problems = inspect(write(tmp_path / "a")).fits(TIED)

    assert any(problem.startswith(told) for problem in problems), problems


def test_a_head_alone_is_not_nothing(tmp_path: Path) -> None:
    """Its pairs add nothing, as B is before any training."""
    path = write_saved(tmp_path / "a", lambda t: [t[name].zero_() for name in t if "lora_B" in name])
    oddities = Oddities(base_model="", base_norms={}, modules=MODEL)

    assert oddities.of_content(loaded(path), path, ()) == ()
    plain = edit_tensors(
        write_lora(tmp_path / "b"), lambda t: [t[name].zero_() for name in t if "lora_B" in name] and None
    )
    assert oddities.of_content(loaded(plain), plain, ()) == (CHANGES_NOTHING,)


def test_whole_weights_have_no_sum(tmp_path: Path) -> None:
    parts = [Ingredient(loaded(write_saved(tmp_path / "a")), 0.5), Ingredient(loaded(write_lora(tmp_path / "b")), 0.5)]

    with pytest.raises(AdapterRejectedError, match="its own weights in the place of lm_head's: those have no sum"):
        mixed("m", parts, MODEL, packing=ROW_MAJOR, max_width=256)


def test_tools_without_a_model_see_what_there_is(tmp_path: Path) -> None:
    """And of two that differ in it they say so."""
    for kind, write in {"whole": write_saved, "tokens": partial(write_tokens, tokens=[3, 8])}.items():
        one, other = (read_whole(write(tmp_path / f"{kind}-{seed}", seed=seed)) for seed in (0, 5))

        assert difference(one, other).facts["rows"][0] != difference(one, other).facts["rows"][1]
        with pytest.raises(AdapterConversionError, match="its own weights in the place of"):
            convert(one, Dialect.PEFT_GRALORA)
