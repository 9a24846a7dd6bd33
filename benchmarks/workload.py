"""What is asked for: the sizes of a run, and requests. Knows no engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Request:
    """Greedy, past any end-of-sequence token. `adapter` "" is the base model."""

    adapter: str
    prompt: tuple[int, ...]
    max_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One run's sizes. `crowd` requests come together, each for an adapter of its own where adapters are distinct."""

    rounds: int = 5
    prompt_tokens: int = 64
    output_tokens: int = 64
    long_prompt_tokens: int = 512
    crowd: int = 16
    large_crowd: int = 32
    large_crowd_tokens: int = 32  # output of each: only steps are compared there
    distinct: tuple[int, ...] = (1, 4, 16, 32)  # adapters among `large_crowd` requests
    rank: int = 16
    k: int = 2
    other_k: tuple[int, ...] = (1, 4, 8)
    # Requests that are served one after another do not influence each other, so a round times a few of them.
    transformers_turns: int = 1
    own_turns: int = 2
    peft_turns: int = 1
    own_fleet: int = 2  # engines that take turns, of the `crowd` that a fleet would have
    bandwidth_bytes: int = 1 << 30
    kernel_segment: int = 256  # tokens of one adapter
    kernel_samples: int = 20
    step_samples: int = 40  # of each step that is repeated

    @property
    def num_adapters(self) -> int:
        """Of the main kind (`rank`, `k`)."""
        return max(self.crowd, *self.distinct)


FULL = Workload()
QUICK = Workload(
    rounds=1,
    prompt_tokens=8,
    output_tokens=6,
    long_prompt_tokens=32,
    crowd=2,
    large_crowd=3,
    large_crowd_tokens=6,
    distinct=(1, 3),
    other_k=(4,),
    transformers_turns=1,
    own_turns=1,
    own_fleet=1,
    bandwidth_bytes=1 << 26,
    kernel_segment=32,
    kernel_samples=2,
    step_samples=2,
)


def make_prompts(count: int, num_tokens: int, vocab_size: int, *, seed: int = 0) -> list[tuple[int, ...]]:
    """Random tokens: what they say has no influence on the work."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocab_size, (count, num_tokens), generator=generator)
    return [tuple(prompt) for prompt in ids.tolist()]


def make_requests(prompts: Sequence[tuple[int, ...]], adapters: Sequence[str], max_tokens: int) -> list[Request]:
    """Request i asks for adapter i, modulo their number."""
    return [Request(adapters[i % len(adapters)], prompt, max_tokens) for i, prompt in enumerate(prompts)]
