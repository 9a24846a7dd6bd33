"""Runs one step of a model of Llama's build on a GPU: decode steps from graphs, all others launch by launch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gralora_kernels.replay import ReplayError
from gralora_kernels.triton_ops.adapters.launch import TritonBackend
from gralora_kernels.triton_ops.attention_launch import PagedAttention
from gralora_kernels.triton_ops.memory import staged
from gralora_runtime.model.description import Description, rotary_tables
from gralora_runtime.model.programs.apart import ApartStep
from gralora_runtime.model.programs.gpu.graphs import CudaCapture, GraphLadder, repeated
from gralora_runtime.model.programs.gpu.inputs import StepInputs
from gralora_runtime.model.programs.gpu.memory import GRAPH_TILES, GRAPH_WIDTH
from gralora_runtime.model.programs.gpu.model import GpuModel, Kernels, fastest_product, invariant_product
from gralora_runtime.model.programs.runner import Served
from gralora_runtime.stepping.batch import StepTensors

logger = logging.getLogger(__name__)

NOT_ADAPTED = 0  # the kind of decode steps without adapters; others are named by the tokens of their tiles


class GpuRunner:
    """Takes the served model over."""

    def __init__(self, served: Served, model: Description) -> None:
        assert isinstance(served.backend, TritonBackend)
        self._device = served.base.model.device
        self._groups = tuple(served.groups.values())
        self.model = GpuModel(
            model,
            rotary=rotary_tables(served.base.model, model, served.base.max_positions),
            kv_pool=served.kv_pool,
            arena=served.arena,
            groups=served.groups,
            layers=served.layers,
            head_name=served.head_name,
            embedding_name=served.embedding_name,
            multiply=invariant_product if served.batch_invariant else fastest_product,
        )
        max_pages = -(-served.max_model_len // served.page_size)
        self._inputs = StepInputs(
            max_tokens=served.max_num_tokens, max_rows=served.max_num_rows, max_pages=max_pages, device=self._device
        )
        self._adapters = served.backend
        self._apart = served.apart
        self._attention = PagedAttention(
            self.model.attention_shape(served.page_size),
            self.model.dtype,
            self._device,
            invariant=served.batch_invariant,
        )
        self._refused: set[str] = set()
        self.ladder: GraphLadder[int] | None = None
        if served.rungs:
            with served.stage(f"Graphs: decode steps of {len(served.rungs)} numbers of rows"):
                self._capture(served.rungs, max_pages, served.max_model_len)
        logger.info(
            "model ready: %d layers, nine launches each; %s products; attention by Triton; graphs of %s rows",
            len(model.layers),
            "batch-invariant" if served.batch_invariant else "the vendor's",
            ", ".join(map(str, served.rungs)) or "no",
        )

    def execute(self, tensors: StepTensors, newest: Tensor | None = None) -> Tensor:
        """As `Runner.execute`."""
        with torch.inference_mode():
            rung = self.ladder.rung(len(tensors.context_lens)) if self.ladder and tensors.max_query_len == 1 else None
            apart = self._apart.step(tensors)
            if rung is not None and not apart:  # graphs have only layers' groups in them
                try:
                    return self._replay(tensors, rung, newest)
                except ReplayError as error:  # raised before anything was launched
                    self._note_refusal(error)
            return self._launch(tensors, newest, apart)

    def _capture(self, rungs: Sequence[int], max_pages: int, max_model_len: int) -> None:
        most = max(rungs)
        self._graph_inputs = StepInputs(max_tokens=most, max_rows=most, max_pages=max_pages, device=self._device)
        self._graph_attention = self._attention.frozen(most, max_model_len)
        self._graph_adapters = {
            tile_tokens: self._adapters.frozen(
                self._groups,
                max_tokens=most,
                max_width=GRAPH_WIDTH,
                dtype=self.model.dtype,
                tile_tokens=tile_tokens,
            )
            for tile_tokens in GRAPH_TILES
        }
        logits = torch.empty(most, self.model.vocab_size, dtype=self.model.dtype, device=self._device)
        on_gpu = self._device.type == "cuda"
        side = torch.cuda.Stream(self._device) if on_gpu else None  # type: ignore[no-untyped-call]

        def compute(rows: int, tile_tokens: int) -> Callable[[], Tensor]:
            step = self._graph_inputs.empty(rows)
            kernels = Kernels(self._graph_attention, self._graph_adapters.get(tile_tokens), side)

            def run() -> Tensor:
                self.model.forward(step, kernels, logits[:rows])
                return logits[:rows]

            return run

        before = torch.cuda.memory_allocated(self._device) if on_gpu else 0
        with torch.inference_mode():
            capture = CudaCapture(self._device) if on_gpu else repeated
            self.ladder = GraphLadder(rungs, (*GRAPH_TILES, NOT_ADAPTED), capture, compute)
        if on_gpu:
            taken = torch.cuda.memory_allocated(self._device) - before
            logger.info("graphs keep %.0f MiB of activations", taken / 2**20)

    def _replay(self, tensors: StepTensors, rung: int, newest: Tensor | None) -> Tensor:
        """A decode step by the graph of `rung` rows. Raises `ReplayError`, with nothing changed, if it does not fit."""
        assert self.ladder is not None
        grouping, index = tensors.grouping, tensors.logits_index
        kind = NOT_ADAPTED
        if grouping.num_adapted:
            kind = self._graph_adapters[GRAPH_TILES[0]].tile_tokens(grouping)
            self._graph_adapters[kind].prepare(self._groups, grouping)
        self._graph_attention.prepare(tensors.query_starts.numpy(), tensors.context_lens.numpy())
        self._graph_inputs.load_padded(tensors, rung, newest)
        logits = self.ladder.replay(rung, kind)
        rows = len(tensors.context_lens)
        if len(index) == rows:
            return logits[:rows].float()
        return logits[staged(index, self._device).to(self._device, non_blocking=True)].float()

    def _launch(self, tensors: StepTensors, newest: Tensor | None, apart: ApartStep) -> Tensor:
        """Any step, launch by launch."""
        if tensors.grouping.num_adapted:
            self._adapters.prepare(self._groups, tensors.grouping)
        self._attention.prepare(tensors.query_starts.numpy(), tensors.context_lens.numpy())
        step = self._inputs.load(tensors, newest)
        kernels = Kernels(self._attention, self._adapters if tensors.grouping.num_adapted else None, apart=apart)
        logits = torch.empty(len(step.logits_index), self.model.vocab_size, dtype=self.model.dtype, device=self._device)
        logits = self.model.forward(step, kernels, logits)
        # A step of unfinished prompts wants none; one row of them costs less than a second way through the model.
        return apart.hide(logits[: len(tensors.logits_index)].float())

    def _note_refusal(self, error: ReplayError) -> None:
        if error.what not in self._refused:
            self._refused.add(error.what)
            logger.warning("a decode step is launched without a graph, which is slower: %s", error)
