"""Runs one step of a Llama-like model on the CPU as one compiled program, without a line of Python per layer."""

from __future__ import annotations

import logging

from torch import Tensor, nn

from gralora_kernels.cpu.attention import attention_pieces
from gralora_kernels.cpu.linear import PackedWeight
from gralora_kernels.cpu.program import DecoderShape, Program, RowNorm, Step
from gralora_kernels.cpu.rows import GELU_TANH, SILU, SQUARED_RELU
from gralora_runtime.model.adaptable import joined_weight_and_bias
from gralora_runtime.model.description import (
    UNTURNED,
    Description,
    Joining,
    LayerDescription,
    Norm,
    Projection,
    rotary_tables,
    soft_capped,
)
from gralora_runtime.model.programs.runner import Served
from gralora_runtime.stepping.batch import StepTensors

ACTIVATIONS = {"silu": SILU, "gelu_tanh": GELU_TANH, "squared_relu": SQUARED_RELU}

logger = logging.getLogger(__name__)


class CpuRunner:
    """Takes the served model over: its linears are packed, which frees the originals."""

    def __init__(self, served: Served, model: Description) -> None:
        self._group = model.heads // model.kv_heads
        self._groups = served.groups
        self._layers = served.layers
        self._logits_softcap = model.logits_softcap
        self._rotary = rotary_tables(served.base.model, model, served.base.max_positions)
        shape = DecoderShape(
            hidden=model.embedding.shape[1],
            intermediate=model.intermediate,
            heads=model.heads,
            kv_heads=model.kv_heads,
            head_dim=model.head_dim,
            page_size=served.page_size,
            activation=ACTIVATIONS[model.activation],
            rotary_dim=self._rotary[UNTURNED][0].shape[1],
            norms_whole_heads=model.norms_whole_heads,
            turns_neighbours=model.turns_neighbours,
            centres=model.centres,
            is_gated=model.is_gated,
        )
        self._program = Program(shape, max_tokens=served.max_num_tokens, arena=served.arena)
        self._least_bits = served.least_bits
        self._apart = served.apart
        embedding = model.embedding.detach()
        kept = self._program.embed(embedding, model.embedding_factor, least_bits=served.least_bits)
        self._layers.hold([served.embedding_name], kept)
        for norm in model.norms:
            self._layers.hold_norm(norm.name, offset=norm.offset, factor=norm.factor)
        self._embedding_factor = model.embedding_factor
        for index, layer in enumerate(model.layers):
            self._add_layer(model, layer, served.kv_pool.keys[index], served.kv_pool.values[index])
        head = model.head
        bias = None if head.bias is None else head.bias.detach()
        packed = PackedWeight(head.weight.detach(), least_bits=served.least_bits)
        self._program.norm_last(self._row_norm(model.final_norm), model.eps)
        self._program.head(packed, bias)
        self._layers.hold([served.head_name], packed, factor=model.logits_factor)
        for module in (head, served.base.model.get_input_embeddings()):  # which may be one and the same weight
            module.weight = _nothing_like(module.weight)
        logger.info(
            "model ready: %d layers compiled into one program, weights in %.0f MiB",
            len(model.layers),
            self.weight_bytes / 2**20,
        )

    @property
    def weight_bytes(self) -> int:
        """Of the base model."""
        return self._program.weight_bytes

    def execute(self, tensors: StepTensors, newest: Tensor | None = None) -> Tensor:
        """As `Runner.execute`."""
        assert newest is None, "host memory is where tokens are"
        pieces = attention_pieces(tensors.query_starts.numpy(), tensors.context_lens.numpy(), self._group)
        apart, ids = self._apart.step(tensors), tensors.input_ids[0]
        logits = self._program.run(
            Step(
                token_ids=apart.base_ids(ids),
                positions=tensors.position_ids[0],
                kv_slots=tensors.kv_slots,
                last=tensors.logits_index,
                page_table=tensors.page_table,
                pieces=pieces,
                grouping=tensors.grouping,
                token_slots=tensors.token_slots,
            ),
            (lambda hidden: apart.embed(hidden, ids, self._embedding_factor)) if apart.changes_embedding else None,
        )
        logits = apart.logits(logits, self._program.normed[: len(logits)])
        return apart.hide(soft_capped(logits, self._logits_softcap))

    def _add_layer(self, model: Description, layer: LayerDescription, keys: Tensor, values: Tensor) -> None:
        program = self._program
        block_input = self._normed(layer.attention_norm, model.eps)
        self._linear(block_input, program.qkv, layer.qkv)
        program.attend(
            keys, values, rotary=self._rotary[layer.rotary], scale=model.scale, softcap=model.softcap,
            window=layer.window, q_norm=self._row_norm_of(layer.q_norm), k_norm=self._row_norm_of(layer.k_norm),
            eps=model.eps,
        )  # fmt: skip
        self._join(program.attended, layer.o, layer.attention_joining, model.eps)
        if not layer.is_parallel:
            block_input = self._normed(layer.mlp_norm, model.eps)
        self._linear(block_input, program.gates_and_ups, layer.gate_up)
        program.gate()
        self._join(program.gated, layer.down, layer.mlp_joining, model.eps)
        for projection in layer.projections:
            _free(projection)

    def _normed(self, norm: Norm | None, eps: float) -> Tensor:
        """What a block reads: the stream, or its norm."""
        if norm is None:
            return self._program.hidden
        self._program.norm(self._row_norm(norm), eps)
        return self._program.normed

    def _join(self, x: Tensor, projection: Projection, joining: Joining, eps: float) -> None:
        """A block's last product: its sums begin at the stream where nothing comes between."""
        if joining.is_plain and all(module.bias is None for module in projection.modules):
            self._linear(x, self._program.hidden, projection, accumulate=True)
            return
        self._linear(x, self._program.joining, projection)
        self._program.join(self._row_norm_of(joining.norm), joining.factor, eps)

    def _row_norm_of(self, norm: Norm | None) -> RowNorm | None:
        return None if norm is None else self._row_norm(norm)

    def _row_norm(self, norm: Norm) -> RowNorm:
        return RowNorm(norm.weight, norm.bias, self._apart.norm_tables[norm.name])

    def _linear(self, x: Tensor, y: Tensor, projection: Projection, *, accumulate: bool = False) -> None:
        weight, bias = joined_weight_and_bias(projection.modules)
        bias = None if bias is None else bias.detach()
        group = self._groups[projection.names]
        packed = PackedWeight(weight.detach(), least_bits=self._least_bits)
        self._layers.hold(projection.names, packed)
        self._program.linear(x, y, packed, group, bias=bias, accumulate=accumulate)


def _free(projection: Projection) -> None:
    for module in projection.modules:
        module.weight = _nothing_like(module.weight)


def _nothing_like(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight.new_empty(0), requires_grad=False)
