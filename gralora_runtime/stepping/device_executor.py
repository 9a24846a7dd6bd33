"""Steps on a GPU. Needs Triton, which `executor` does not."""

from __future__ import annotations

from collections.abc import Sequence

from gralora_runtime.model.programs.runner import Runner
from gralora_runtime.observation.steps import Phase, StepObservation
from gralora_runtime.sampling.device import DeviceSampler, Results
from gralora_runtime.sampling.state import SamplerState
from gralora_runtime.stepping.batch import StepTensors
from gralora_runtime.stepping.executor import Later, Launched


class OnDevice:
    """Launches a step's kernels and its sampling's, and returns: the device does one step after the other by itself."""

    def __init__(self, runner: Runner, sampler: DeviceSampler, observation: StepObservation) -> None:
        self._runner, self._sampler, self._observation = runner, sampler, observation

    def launch(self, tensors: StepTensors, states: Sequence[SamplerState], seats: Sequence[int]) -> Launched:
        def run() -> Results:
            logits = self._runner.execute(tensors, self._sampler.tokens)
            return self._sampler.sample(logits, states, seats)

        results = self._observation.timed(Phase.FORWARD, run)
        return Later(lambda: self._observation.timed(Phase.SAMPLE, results.read))

    def close(self) -> None:
        """Nothing runs beside the caller but the device."""
