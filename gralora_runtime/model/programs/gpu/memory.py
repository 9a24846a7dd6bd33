"""How much of a GPU's memory a program needs beside weights and pools, which are sized by what is left. An estimate."""

from __future__ import annotations

from gralora_kernels.attention_work import MAX_ITEMS
from gralora_kernels.triton_ops.adapters.launch import BLOCKING
from gralora_runtime.model.description import Description

GRAPH_TILES = (1, BLOCKING.small_tile)  # tokens of adapters' tiles: decode steps of either have graphs of their own
GRAPHS_PER_RUNG = len(GRAPH_TILES) + 1  # and those without adapters
GRAPH_WIDTH = 512  # columns of u in a module: adapters of larger r * k are served without a graph
GRAPH_BYTES = 4 << 20  # of one graph: the parameters of some hundred launches
MAX_MODULES = 3  # that share an input: q, k and v
FLOAT_BYTES = 4
SAMPLING_BYTES = 12  # of a logit: its score, its place among candidates, how often its token was written


def workspace_bytes(model: Description, *, max_tokens: int, max_rows: int, num_rungs: int) -> int:
    """Activations of the largest step, and all that captured steps keep to themselves."""
    size = model.embedding.dtype.itemsize
    vocab, hidden = model.embedding.shape
    heads = model.heads + 2 * model.kv_heads
    token = size * (2 * hidden + (heads + model.heads) * model.head_dim + 3 * model.intermediate)
    row = token + vocab * (2 * (size + FLOAT_BYTES) + SAMPLING_BYTES)
    if num_rungs:
        planes = BLOCKING.num_planes(model.intermediate)
        row += len(GRAPH_TILES) * FLOAT_BYTES * MAX_MODULES * GRAPH_WIDTH * planes
        row += FLOAT_BYTES * MAX_ITEMS * model.heads * (model.head_dim + 2)
    return max_tokens * token + max_rows * row + num_rungs * GRAPHS_PER_RUNG * GRAPH_BYTES
