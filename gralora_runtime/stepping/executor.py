"""Who computes the steps that were built, in the order in which they come. Knows no policy.

A step may be launched while the one before still runs. Rows whose input that one chooses (`StepTensors.follows`) get it
where it is: the host learns of a token only when it waits for its step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
from torch import Tensor

from gralora_runtime.model.programs.runner import Runner
from gralora_runtime.observation.steps import Phase, StepObservation
from gralora_runtime.sampling.host import advance, sample
from gralora_runtime.sampling.outcome import Sampled, SampledToken
from gralora_runtime.sampling.state import SamplerState
from gralora_runtime.stepping.batch import StepTensors
from gralora_runtime.structured.masks import begin


class Launched(Protocol):
    """A step on its way."""

    def wait(self) -> Sequence[Sampled]:
        """What each sampling row chose, once it is known. Raises what computing it raised."""


class Executor(Protocol):
    """Computes steps in order."""

    def launch(self, tensors: StepTensors, states: Sequence[SamplerState], seats: Sequence[int]) -> Launched:
        """Begin a step. `states`, which go on by one token, and `seats` are of its sampling rows."""

    def close(self) -> None:
        """End what runs beside the caller."""


class _HostStep:
    def __init__(
        self, runner: Runner, tensors: StepTensors, states: Sequence[SamplerState], before: _HostStep | None
    ) -> None:
        self._runner, self._tensors, self._states, self._before = runner, tensors, states, before
        self.tokens = np.zeros(len(states), np.int64)  # of a row that has none: 0

    def compute(self, observation: StepObservation) -> Sequence[Sampled]:
        self._insert_tokens()
        # All tokens of the steps before are known by now, so masks are filled while the forward pass runs.
        wait_for_masks = begin([state.matcher for state in self._states if state.matcher is not None])
        logits = observation.timed(Phase.FORWARD, self._runner.execute, self._tensors)
        return observation.timed(Phase.SAMPLE, self._sample, logits, wait_for_masks)

    def _sample(self, logits: Tensor, wait_for_masks: Callable[[], None]) -> Sequence[Sampled]:
        wait_for_masks()
        sampled = advance(self._states, sample(logits, self._states))
        for row, result in enumerate(sampled):
            if isinstance(result, SampledToken):
                self.tokens[row] = result.token_id
        return sampled

    def _insert_tokens(self) -> None:
        before, self._before = self._before, None
        follows = self._tensors.follows.numpy()
        if before is not None and len(rows := (follows >= 0).nonzero()[0]):
            self._tensors.input_ids[0].numpy()[rows] = before.tokens[follows[rows]]


class InTurn:
    """Computes a step when it is waited for, on the caller's thread, and samples on the host."""

    def __init__(self, runner: Runner, observation: StepObservation) -> None:
        self._runner, self._observation = runner, observation
        self._newest: _HostStep | None = None

    def launch(self, tensors: StepTensors, states: Sequence[SamplerState], seats: Sequence[int]) -> Launched:  # noqa: ARG002
        self._newest = step = _HostStep(self._runner, tensors, states, self._newest)
        return Later(lambda: step.compute(self._observation))

    def close(self) -> None:
        """Nothing runs beside the caller."""


class Beside:
    """Computes on a thread of its own, and samples there."""

    def __init__(self, runner: Runner, observation: StepObservation, prepare_thread: Callable[[], None]) -> None:
        self._runner, self._observation = runner, observation
        self._newest: _HostStep | None = None
        self._thread = ThreadPoolExecutor(1, "gralora-forward", initializer=prepare_thread)

    def launch(self, tensors: StepTensors, states: Sequence[SamplerState], seats: Sequence[int]) -> Launched:  # noqa: ARG002
        self._newest = step = _HostStep(self._runner, tensors, states, self._newest)
        return Later(self._thread.submit(step.compute, self._observation).result)

    def close(self) -> None:
        self._thread.shutdown()


class Later:
    """A `Launched` that is a call."""

    def __init__(self, wait: Callable[[], Sequence[Sampled]]) -> None:
        self.wait = wait
