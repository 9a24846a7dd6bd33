"""When a version that gives no numbers gets no requests for a while. Knows neither requests nor weights.

One such answer is that prompt's own overflow. Several in a row, with no good one between, are the version's: each would
take its steps and come to nothing. A prompt that is made to overflow keeps nobody from a version that others use.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from gralora_runtime.adapters.catalogue.quarantine import Quarantine
from gralora_runtime.errors import AdapterQuarantinedError

IN_A_ROW = 3  # then they are no accident


@dataclass(slots=True)
class Numerics:
    """Of one version, since it last gave a good answer."""

    failures: int = 0
    problem: str = ""  # the last one
    quarantine: Quarantine = field(default_factory=Quarantine)

    def fail(self, problem: str) -> bool:
        """A request ended with logits that are no numbers. Whether that begins a quarantine: each lasts longer."""
        self.failures += 1
        self.problem = problem
        begins = self.failures >= IN_A_ROW and not self.quarantine.lasts
        if begins:
            self.quarantine.extend()
        return begins

    def error(self, label: str) -> AdapterQuarantinedError | None:
        """What requests get meanwhile; None: it may be used."""
        if not self.quarantine.lasts:
            return None
        return AdapterQuarantinedError(label, self.failures, self.problem, self.quarantine.left_s)
