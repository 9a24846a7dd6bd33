"""What the layers of the model need to know about the step that is running, and for no longer than it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from gralora_runtime.model.programs.apart import ApartStep
from gralora_runtime.stepping.batch import StepTensors


class StepContext:
    """Owned by the runner and handed to every wrapped layer; holds the step's tensors during one forward pass."""

    def __init__(self) -> None:
        self._tensors: StepTensors | None = None
        self.apart = ApartStep()

    @property
    def tensors(self) -> StepTensors:
        assert self._tensors is not None, "a wrapped layer was called outside of a step"
        return self._tensors

    @contextmanager
    def running(self, tensors: StepTensors, apart: ApartStep) -> Iterator[None]:
        """Hold both for the body, and let go of them whatever happens in it."""
        assert self._tensors is None, "steps do not nest"
        self._tensors, self.apart = tensors, apart
        try:
            yield
        finally:
            self._tensors, self.apart = None, ApartStep()
