"""Runs one step of a Llama-like model on the CPU as one compiled program, without a line of Python per layer."""

from __future__ import annotations

import logging

from torch import Tensor, nn

from gralora_kernels.cpu.attention import attention_pieces
from gralora_kernels.cpu.linear import PackedWeight
from gralora_kernels.cpu.program import DecoderShape, Program, Step
from gralora_kernels.cpu.rows import GELU_TANH, SILU
from gralora_runtime.model.adaptable import joined_weight_and_bias
from gralora_runtime.model.description import Description, LayerDescription, OtherBuildError, Projection, rotary_tables
from gralora_runtime.model.programs.runner import Served
from gralora_runtime.stepping.batch import StepTensors

logger = logging.getLogger(__name__)


class CpuRunner:
    """Takes the served model over: its linears are packed, which frees the originals.

    Raises `OtherBuildError`, before it changes anything, for a model that the program cannot compute.
    """

    def __init__(self, served: Served, model: Description) -> None:
        if any(projection.has_bias for layer in model.layers for projection in (layer.o, layer.down)):
            raise OtherBuildError(
                "its o or down projection has a bias, but here their sums begin at the residual stream"
            )
        self._group = model.heads // model.kv_heads
        self._groups = served.groups
        cos, sin = rotary_tables(served.base.model, served.base.max_positions)
        shape = DecoderShape(
            hidden=model.embedding.shape[1],
            intermediate=model.intermediate,
            heads=model.heads,
            kv_heads=model.kv_heads,
            head_dim=model.head_dim,
            page_size=served.page_size,
            activation={"silu": SILU, "gelu_tanh": GELU_TANH}[model.activation],
            cos=cos,
            sin=sin,
        )
        self._program = Program(shape, max_tokens=served.max_num_tokens, arena=served.arena)
        self._program.embed(model.embedding.detach(), model.embedding_factor)
        for index, layer in enumerate(model.layers):
            self._add_layer(model, layer, served.kv_pool.keys[index], served.kv_pool.values[index])
        head = model.head
        bias = None if head.bias is None else head.bias.detach()
        self._program.head(model.final_norm, model.eps, PackedWeight(head.weight.detach()), bias)
        logger.info("model ready: %d layers compiled into one program", len(model.layers))

    def execute(self, tensors: StepTensors, newest: Tensor | None = None) -> Tensor:
        """Logits of the tokens in `logits_index`, fp32 [sampling rows, vocab]."""
        assert newest is None, "host memory is where tokens are"
        pieces = attention_pieces(tensors.query_starts.numpy(), tensors.context_lens.numpy(), self._group)
        return self._program.run(
            Step(
                token_ids=tensors.input_ids[0],
                positions=tensors.position_ids[0],
                kv_slots=tensors.kv_slots,
                last=tensors.logits_index,
                page_table=tensors.page_table,
                pieces=pieces,
                grouping=tensors.grouping,
            )
        )

    def _add_layer(self, model: Description, layer: LayerDescription, keys: Tensor, values: Tensor) -> None:
        program, eps = self._program, model.eps
        program.norm(layer.input_norm, eps)
        self._linear(program.normed, program.qkv, layer.qkv)
        program.attend(
            keys, values, scale=model.scale, window=layer.window, q_norm=layer.q_norm, k_norm=layer.k_norm, eps=eps
        )
        self._linear(program.attended, program.hidden, layer.o, accumulate=True)
        program.norm(layer.post_norm, eps)
        self._linear(program.normed, program.gates_and_ups, layer.gate_up)
        program.gate()
        self._linear(program.gated, program.hidden, layer.down, accumulate=True)
        for projection in layer.projections:
            _free(projection)

    def _linear(self, x: Tensor, y: Tensor, projection: Projection, *, accumulate: bool = False) -> None:
        weight, bias = joined_weight_and_bias(projection.modules)
        bias = None if bias is None else bias.detach()
        group = self._groups[projection.names]
        self._program.linear(x, y, PackedWeight(weight.detach()), group, bias=bias, accumulate=accumulate)


def _free(projection: Projection) -> None:
    for module in projection.modules:
        module.weight = nn.Parameter(module.weight.new_empty(0), requires_grad=False)
