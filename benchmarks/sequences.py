"""Requests as the engine's thread has them, for benchmarks that step an engine themselves, and leases."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from concurrent.futures import Future

from gralora_runtime.adapters.residency.lease import AdapterLease
from gralora_runtime.detokenizer import Detokenizer
from gralora_runtime.request import ResponseParams, SamplingParams, StoppingParams
from gralora_runtime.sampling.state import SamplerState
from gralora_runtime.scheduling.sequence import Sequence

GREEDY = SamplingParams(temperature=0.0)


def make_sequence(
    request_id: str,
    prompt: list[int],
    lease: AdapterLease,
    *,
    max_tokens: int,
    vocab_size: int,
    eos_token_ids: Collection[int],
    sampling: SamplingParams = GREEDY,
    response: ResponseParams | None = None,
    seed: int = 0,
    detokenizer: Detokenizer | None = None,
) -> Sequence:
    """One that nothing but `max_tokens` ends. `prompt` is taken over."""
    stopping = StoppingParams(ignore_eos=True)
    return Sequence(
        request_id=request_id,
        adapter_name=lease.name,
        tokens=prompt,
        num_prompt=len(prompt),
        max_tokens=max_tokens,
        stopping=stopping,
        eos_token_ids=eos_token_ids,
        lease=lease,
        sampler=SamplerState(
            sampling,
            stopping,
            response or ResponseParams(),
            seed=seed,
            prompt_token_ids=prompt,
            eos_token_ids=eos_token_ids,
            vocab_size=vocab_size,
        ),
        detokenizer=detokenizer,
        arrival_s=time.monotonic(),
        seed=seed,
    )


class Everybody:
    """In the place of the adapters' manager: every adapter is there, and stays."""

    def __init__(self, lease_of: Callable[[str], AdapterLease]) -> None:
        self._lease_of = lease_of

    def acquire(self, name: str) -> Future[AdapterLease]:
        future: Future[AdapterLease] = Future()
        future.set_result(self._lease_of(name))
        return future

    def abandon(self, acquired: Future[AdapterLease]) -> None:
        """Nothing was taken."""

    def close(self) -> None:
        """Nothing is open."""
