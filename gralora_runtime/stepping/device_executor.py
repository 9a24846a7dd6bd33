"""Steps on a GPU. Needs Triton, which `executor` does not."""

from __future__ import annotations

from collections.abc import Sequence

from gralora_runtime.model.programs.runner import Runner
from gralora_runtime.observation.steps import Phase, StepObservation
from gralora_runtime.sampling.state import SamplerState
from gralora_runtime.sampling.widths import Choices, SamplerOfWidths
from gralora_runtime.stepping.batch import StepTensors
from gralora_runtime.stepping.executor import Later, Launched
from gralora_runtime.structured.masks import fill


class OnDevice:
    """Launches a step's kernels and its sampling's, and returns: the device does one step after the other by itself.

    But where an answer has to match something: masks follow from the tokens of the step before, which is waited for
    once this one's forward pass is on its way, and are filled while it runs.
    """

    def __init__(self, runner: Runner, sampler: SamplerOfWidths, observation: StepObservation) -> None:
        self._runner, self._sampler, self._observation = runner, sampler, observation
        self._newest: Choices | None = None

    def launch(self, tensors: StepTensors, states: Sequence[SamplerState], seats: Sequence[int]) -> Launched:
        def run() -> Choices:
            logits = self._runner.execute(tensors, self._sampler.tokens)
            self._fill_masks(states)
            return self._sampler.sample(logits, states, seats)

        results = self._newest = self._observation.timed(Phase.FORWARD, run)
        return Later(lambda: self._observation.timed(Phase.SAMPLE, results.read))

    def _fill_masks(self, states: Sequence[SamplerState]) -> None:
        matchers = [state.matcher for state in states if state.matcher is not None]
        if matchers and self._newest is not None:
            self._newest.read()
        fill(matchers)

    def close(self) -> None:
        """Nothing runs beside the caller but the device."""
