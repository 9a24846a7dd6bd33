"""What happens to rows between the products: kernels do what their twins do, and those what transformers does."""

from __future__ import annotations

import pytest
import torch
from support.numeric import assert_close
from torch import Tensor
from transformers import GlmConfig, LlamaConfig, Phi3Config
from transformers.activations import ACT2FN
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.glm import modeling_glm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding, apply_rotary_pos_emb
from transformers.models.phi3 import modeling_phi3

from gralora_kernels.reference import rows as twin
from gralora_kernels.triton_ops.activation import activate
from gralora_kernels.triton_ops.norm import add_norm, norm_rows
from gralora_kernels.triton_ops.rotary import rotate_and_store

# Without bf16, which the interpreter cuts off where a GPU rounds; the twins are compared in all three.
INTERPRETED = [torch.float32, torch.float16]
EPS = 1e-5
# Narrower than a load, of no power of two, of odd length, Llama's, the next wider program's, the widest.
WIDTHS = [7, 32, 100, 4096, 4099, 5120, 16384]
# A sigmoid far from 0 is 1 / (1 + inf), which is right and which numpy warns of.
exp_overflows = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
# head_dim, rotary_dim, heads, kv_heads, norms
HEADS = [
    (16, 16, 4, 2, False),
    (64, 32, 17, 1, True),
    (72, 72, 3, 1, True),
    (80, 80, 3, 3, False),
    (128, 96, 8, 2, False),
    (128, 128, 8, 4, True),
    (256, 256, 2, 1, False),
]
RELU = ("squared_relu", False)
SLOTS = [9, -1, 0, 3, 11]  # of 3 pages of 4, the second token being padding


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def is_same(first: Tensor, second: Tensor) -> bool:
    """Bit for bit, NaN included."""
    return torch.equal(first.contiguous().view(torch.uint8), second.contiguous().view(torch.uint8))


@pytest.mark.parametrize("dtype", INTERPRETED)
@pytest.mark.parametrize("hidden", WIDTHS)
def test_the_residual_is_added_to_and_normed(hidden, dtype):
    residual, x, weight = random(3, hidden, dtype=dtype), random(3, hidden, dtype=dtype, seed=1), random(hidden)
    expected_residual, expected = residual.clone(), torch.empty_like(residual)
    twin.add_norm(expected, expected_residual, x, weight.to(dtype), EPS)
    y = torch.empty(3, hidden, dtype=dtype)

    add_norm(y, residual, x, weight.to(dtype), EPS)

    assert is_same(expected_residual, residual)
    assert_close(expected, y)


@pytest.mark.parametrize("hidden", [100, 4096])
def test_the_first_norm_only_reads_the_residual(hidden):
    residual, weight = random(3, hidden), random(hidden)
    before, y = residual.clone(), torch.empty(3, hidden)

    add_norm(y, residual, None, weight, EPS)

    assert is_same(before, residual)
    assert_close(twin.norm(residual, weight, EPS), y)


def test_the_norm_is_of_the_residual_as_stored():
    """Beside 2,048 an fp16 number loses an x of 0.99; a norm of the unrounded sum would be 0.05 % less."""
    residual, x = random(2, 64, dtype=torch.float16), torch.zeros(2, 64, dtype=torch.float16)
    residual[:, 0], x[:, 0] = 2048, 0.99
    weight = torch.ones(64, dtype=torch.float16)
    unrounded = twin.norm(residual.float() + x.float(), weight, EPS).to(torch.float16)
    y = torch.empty_like(residual)

    add_norm(y, residual, x, weight, EPS)

    assert is_same(twin.norm(residual, weight, EPS), y)
    assert not is_same(unrounded, y)


@pytest.mark.parametrize("x", [None, random(4, 100, dtype=torch.float16, seed=1)], ids=["alone", "added"])
def test_the_final_norm_takes_the_rows_asked_for_and_leaves_the_residual(x):
    """Weights in fp32, as Gemma's 1 + w may be."""
    residual, weight = random(4, 100, dtype=torch.float16), random(100)
    index = torch.tensor([3, 1, 3])
    before, y, whole = residual.clone(), torch.empty(3, 100, dtype=torch.float16), torch.empty_like(residual)
    expected = torch.empty_like(y)
    twin.norm_rows(expected, residual, index, x=x, weight=weight, eps=EPS)

    norm_rows(y, residual, index, x=x, weight=weight, eps=EPS)

    assert is_same(before, residual)
    assert_close(expected, y)
    add_norm(whole, residual, x, weight, EPS)
    assert is_same(whole[index], y)


@pytest.mark.parametrize("hidden", [100, 5120])
def test_a_row_is_normed_alike_alone_and_in_a_batch(hidden):
    residual, x, weight = random(4, hidden), random(4, hidden, seed=1), random(hidden)
    alone, y, y_alone = residual[2:3].clone(), torch.empty(4, hidden), torch.empty(1, hidden)

    add_norm(y, residual, x, weight, EPS)
    add_norm(y_alone, alone, x[2:3], weight, EPS)

    assert is_same(y[2:3], y_alone)
    assert is_same(residual[2:3], alone)


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("dtype", INTERPRETED)
@pytest.mark.parametrize("hidden", [7, 100, 4099])
def test_a_mean_is_subtracted_and_a_bias_added(hidden, dtype, has_bias):
    """Far from 0, where a sum of squares would lose what a variance is made of."""
    residual, x, weight = random(3, hidden, dtype=dtype) + 5, random(3, hidden, dtype=dtype, seed=1), random(hidden)
    options = {"bias": random(hidden, seed=2) if has_bias else None, "centres": True}
    index, expected_residual = torch.tensor([2, 0]), residual.clone()
    expected, expected_rows = torch.empty(3, hidden, dtype=dtype), torch.empty(2, hidden, dtype=dtype)
    twin.norm_rows(expected_rows, residual, index, x=x, weight=weight, eps=EPS, **options)
    twin.add_norm(expected, expected_residual, x, weight, EPS, **options)
    y, rows = torch.empty(3, hidden, dtype=dtype), torch.empty(2, hidden, dtype=dtype)

    norm_rows(rows, residual, index, x=x, weight=weight, eps=EPS, **options)
    add_norm(y, residual, x, weight, EPS, **options)

    assert is_same(expected_residual, residual)
    assert_close(expected, y)
    assert_close(expected_rows, rows)


def test_a_row_that_is_too_wide_is_refused():
    row = torch.zeros(1, 16385)

    with pytest.raises(ValueError, match="rows of 16385 elements are too wide"):
        add_norm(row, row.clone(), None, row[0], EPS)


class Rotation:
    """Arguments of `rotate_and_store`: five tokens, the second of them padding."""

    def __init__(
        self, head_dim, rotary_dim, heads, kv_heads, norms, dtype=torch.float32, positions=torch.int64, neighbours=False
    ):
        self.heads, self.kv_heads, self.head_dim, self.eps = heads, kv_heads, head_dim, 1e-6
        self.neighbours = neighbours
        self.qkv = random(5, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
        self.keys, self.values = (random(3, 4, kv_heads, head_dim, dtype=dtype, seed=seed) for seed in (1, 2))
        self.positions, self.kv_slots = torch.tensor([6, 0, 1, 0, 30], dtype=positions), torch.tensor(SLOTS)
        angles = torch.outer(torch.arange(31.0), 1 / 1e4 ** (torch.arange(0, rotary_dim, 2) / rotary_dim))
        self.cos, self.sin = (torch.cat([half, half], 1) for half in (angles.cos(), angles.sin()))
        self.q_norm, self.k_norm = (random(head_dim, dtype=dtype, seed=s) if norms else None for s in (3, 4))

    def run(self, function, tokens=slice(None)):
        """Fresh qkv, keys and values, as `function` leaves them; qkv per head."""
        qkv, keys, values = self.qkv[tokens].clone(), self.keys.clone(), self.values.clone()
        names = ("cos", "sin", "heads", "kv_heads", "head_dim", "q_norm", "k_norm", "eps", "neighbours")
        function(
            qkv, keys, values, self.positions[tokens], self.kv_slots[tokens], **{n: getattr(self, n) for n in names}
        )
        return qkv.view(len(qkv), -1, self.head_dim), keys.flatten(0, 1), values.flatten(0, 1)


@pytest.mark.parametrize("dtype", INTERPRETED)
@pytest.mark.parametrize(
    ("case", "neighbours"), [*((case, False) for case in HEADS), *((case, True) for case in HEADS[:3])], ids=str
)
def test_queries_and_keys_are_turned_and_stored(case, neighbours, dtype):
    rotation = Rotation(*case, dtype, neighbours=neighbours)
    expected_qkv, expected_keys, expected_values = rotation.run(twin.rotate_and_store)
    heads, written = rotation.heads, [slot for slot in SLOTS if slot >= 0]

    qkv, keys, values = rotation.run(rotate_and_store)

    assert_close(expected_qkv[:, :heads], qkv[:, :heads])
    assert_close(expected_keys[written], keys[written])
    assert is_same(expected_values, values)
    assert is_same(rotation.qkv.view_as(qkv)[:, heads:], qkv[:, heads:])
    others = [slot for slot in range(12) if slot not in written]
    assert is_same(rotation.keys.flatten(0, 1)[others], keys[others])


def test_positions_may_be_int32():
    wide, narrow = (Rotation(*HEADS[0], positions=dtype) for dtype in (torch.int64, torch.int32))

    for first, second in zip(wide.run(rotate_and_store), narrow.run(rotate_and_store), strict=True):
        assert is_same(first, second)


def test_values_are_copied_whatever_they_are():
    rotation = Rotation(*HEADS[2])
    value = torch.full([72], torch.inf)
    value[::2] = torch.nan
    rotation.qkv[2, -72:] = value

    _, _, values = rotation.run(rotate_and_store)

    assert is_same(value, values[SLOTS[2], 0])


@pytest.mark.parametrize("case", HEADS[2:5:2], ids=str)
def test_a_token_is_turned_alike_alone_and_in_a_batch(case):
    rotation = Rotation(*case)

    qkv, keys, _ = rotation.run(rotate_and_store)
    alone, keys_alone, _ = rotation.run(rotate_and_store, slice(3, 4))

    assert is_same(qkv[3], alone[0])
    assert is_same(keys[SLOTS[3]], keys_alone[SLOTS[3]])


@exp_overflows
@pytest.mark.parametrize("dtype", INTERPRETED)
@pytest.mark.parametrize(("kind", "gated"), [("silu", True), ("gelu_tanh", True), ("gelu_tanh", False), RELU])
@pytest.mark.parametrize("width", [1, 50, 2048, 4100])
def test_gates_open_for_ups_or_are_all_there_is(width, kind, gated, dtype):
    x = random(3, (1 + gated) * width, dtype=dtype) * 3
    expected, out = torch.empty(3, width, dtype=dtype), torch.empty(3, width, dtype=dtype)
    twin.activate(expected, x, kind, gated=gated)

    activate(out, x, kind, gated=gated)

    assert_close(expected, out)
    alone = torch.empty(1, width, dtype=dtype)
    activate(alone, x[1:2], kind, gated=gated)
    assert is_same(out[1:2], alone)


@exp_overflows
@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
def test_extreme_gates_are_shut_or_open(kind):
    out = torch.empty(1, 4)

    activate(out, torch.tensor([[-1e4, -100.0, 100.0, 1e4, 1.0, 1.0, 1.0, 2.0]]), kind)

    assert torch.equal(torch.tensor([[0.0, 0.0, 100.0, 2e4]]), out.where(out.abs() > 1e-30, 0))


@pytest.mark.parametrize("dtype", [*INTERPRETED, torch.bfloat16])
@pytest.mark.parametrize(("module", "offset"), [(LlamaRMSNorm, 0), (GemmaRMSNorm, 1)])
def test_the_norms_twin_is_transformers_norm(module, offset, dtype):
    norm, x = module(100, eps=EPS).to(dtype).requires_grad_(False), random(3, 100, dtype=dtype)
    norm.weight.copy_(random(100, seed=1))

    assert_close(norm(x), twin.norm(x, norm.weight.float() + offset, EPS))


@pytest.mark.parametrize("dtype", [*INTERPRETED, torch.bfloat16])
def test_the_norms_twin_is_torchs_layer_norm(dtype):
    norm, x = torch.nn.LayerNorm(100, eps=EPS).to(dtype).requires_grad_(False), random(3, 100, dtype=dtype) + 2
    norm.weight.copy_(random(100, seed=1))
    norm.bias.copy_(random(100, seed=2))

    assert_close(norm(x), twin.norm(x, norm.weight, EPS, bias=norm.bias, centres=True))


@pytest.mark.parametrize("partial", [1.0, 0.75, 0.5])
def test_the_rotations_twin_is_transformers_rotation(partial):
    """Phi's partial rotary and GLM's of neighbours as well as Llama's whole one, with the tables that transformers
    makes."""
    heads, kv_heads, head_dim = 4, 2, 32
    sizes = {"hidden_size": 128, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "pad_token_id": 0}
    if partial == 1.0:
        embedding, turn = LlamaRotaryEmbedding(LlamaConfig(**sizes)), apply_rotary_pos_emb
    elif partial == 0.5:
        config = GlmConfig(**sizes, head_dim=head_dim, partial_rotary_factor=partial)
        embedding, turn = modeling_glm.GlmRotaryEmbedding(config), modeling_glm.apply_rotary_pos_emb
    else:
        config = Phi3Config(**sizes, partial_rotary_factor=partial)
        embedding, turn = modeling_phi3.Phi3RotaryEmbedding(config), modeling_phi3.apply_rotary_pos_emb
    rotation = Rotation(head_dim, int(partial * head_dim), heads, kv_heads, norms=False, neighbours=partial == 0.5)
    cos, sin = embedding(torch.zeros(1), torch.arange(31)[None])
    rotation.cos, rotation.sin = cos[0].contiguous(), sin[0].contiguous()
    rows = rotation.qkv.view(5, -1, head_dim).transpose(0, 1)[None]
    at = rotation.positions
    q, k = turn(rows[:, :heads], rows[:, heads : heads + kv_heads], cos[:, at], sin[:, at])

    qkv, keys, _ = rotation.run(twin.rotate_and_store)

    assert_close(q[0].transpose(0, 1), qkv[:, :heads])
    assert_close(k[0].transpose(0, 1)[[0, 2, 3, 4]], keys[[9, 0, 3, 11]])


@pytest.mark.parametrize(
    ("kind", "name"),
    [("silu", "silu"), ("gelu_tanh", "gelu_pytorch_tanh"), ("gelu_tanh", "gelu_new"), ("squared_relu", "relu2")],
)
def test_the_activations_twin_is_transformers_activation(kind, name):
    gates_and_ups, out = random(3, 200), torch.empty(3, 100)

    twin.activate(out, gates_and_ups, kind)

    assert_close(ACT2FN[name](gates_and_ups[:, :100]) * gates_and_ups[:, 100:], out)
