"""The work that cannot be avoided, in bytes to read and FLOPs to compute: what floors are made of.

Counts linear layers, head and adapters. The KV cache and attention are left out, so floors are a little low.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from benchmarks.workload import Request

BYTES = 4  # of a float32
FLOPS = 2  # per parameter and token: one multiplication, one addition


@dataclass(frozen=True, slots=True)
class Cost:
    """`times` passes that each read so many bytes and compute so many FLOPs; a pass is bound by one of the two."""

    bytes: int
    flops: int
    times: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCost:
    """Parameters of one model, and of its adapters by name, with the bytes in which those are stored."""

    layer_params: int
    head_params: int
    adapter_params: Mapping[str, int]
    adapter_sizes: Mapping[str, int]

    @classmethod
    def of(
        cls, model: PreTrainedModel, adapter_params: Mapping[str, int], adapter_sizes: Mapping[str, int]
    ) -> ModelCost:
        """A head that shares the embedding's weight is read by every step all the same."""
        head = model.get_output_embeddings()
        linears = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
        return cls(
            layer_params=sum(linear.weight.numel() for linear in linears),
            head_params=head.weight.numel(),
            adapter_params=adapter_params,
            adapter_sizes=adapter_sizes,
        )

    def adapter_bytes(self, requests: Sequence[Request]) -> int:
        """Each adapter that is asked for, once."""
        return sum(self.adapter_sizes[name] for name in {request.adapter for request in requests} if name)

    def decode(self, requests: Sequence[Request], *, merged: bool = False) -> Cost:
        """One step: one token of every request."""
        flops = FLOPS * len(requests) * (self.layer_params + self.head_params)
        num_bytes = BYTES * (self.layer_params + self.head_params)
        if merged:
            return Cost(num_bytes, flops)
        return Cost(num_bytes + self.adapter_bytes(requests), flops + self._adapter_flops(requests, 1))

    def prefill(self, requests: Sequence[Request], *, merged: bool = False) -> Cost:
        """All prompts, and the head for the last token of each."""
        num_tokens = sum(len(request.prompt) for request in requests)
        flops = FLOPS * (num_tokens * self.layer_params + len(requests) * self.head_params)
        num_bytes = BYTES * (self.layer_params + self.head_params)
        if merged:
            return Cost(num_bytes, flops)
        return Cost(num_bytes + self.adapter_bytes(requests), flops + self._adapter_flops(requests, None))

    def whole(self, requests: Sequence[Request], *, merged: bool = False) -> list[Cost]:
        """Prefill, and the steps after the first token."""
        step = self.decode(requests, merged=merged)
        steps = max(request.max_tokens for request in requests) - 1
        return [self.prefill(requests, merged=merged), Cost(step.bytes, step.flops, steps)]

    def _adapter_flops(self, requests: Sequence[Request], tokens_each: int | None) -> int:
        return FLOPS * sum(
            self.adapter_params[request.adapter] * (tokens_each if tokens_each is not None else len(request.prompt))
            for request in requests
            if request.adapter
        )
