"""The server's metrics page before and after a run, read as what the server did in between."""

from __future__ import annotations

import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from gralora_runtime.errors import ConfigError
from gralora_server.loadtest.result import ServerStory
from gralora_server.metrics import series
from gralora_server.metrics.series import Series

TIMEOUT_S = 10.0
MEMORY = "process_resident_memory_bytes"
Labels = frozenset[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Page:
    """The samples of one scrape, by name and labels."""

    samples: Mapping[tuple[str, Labels], float]

    @classmethod
    def read(cls, address: str) -> Page:
        """`address`: HOST:PORT. Blocking. Raises ConfigError if there is no such page."""
        url = f"http://{address}/metrics"
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:
                return cls.parse(answer.read().decode())
        except (OSError, ValueError) as cause:
            raise ConfigError(f"no metrics page can be read at {url}: {cause}") from cause

    @classmethod
    def parse(cls, text: str) -> Page:
        families = text_string_to_metric_families(text)
        return cls(
            {(one.name, frozenset(one.labels.items())): one.value for family in families for one in family.samples}
        )

    @property
    def memory_bytes(self) -> int | None:
        """Resident, of the server's process; None where the system does not say."""
        found = self.samples.get((MEMORY, frozenset()))
        return None if found is None else int(found)

    def value(self, of: Series, suffix: str = "", **labels: str) -> float:
        return self.samples.get((of.name + suffix, frozenset(labels.items())), 0.0)

    def labels(self, of: Series, suffix: str, label: str) -> list[str]:
        """The values that a label has on the page."""
        return [dict(labels)[label] for name, labels in self.samples if name == of.name + suffix]


def story(before: Page, after: Page) -> ServerStory:
    """What happened between two scrapes of one server."""

    def since(of: Series, suffix: str = "", **labels: str) -> float:
        return after.value(of, suffix, **labels) - before.value(of, suffix, **labels)

    def mean(of: Series) -> float:
        count = since(of, "_count")
        return since(of, "_sum") / count if count else 0.0

    phases = after.labels(series.STEP_PHASE, "_sum", "phase")
    return ServerStory(
        steps=int(since(series.STEPS)),
        mean_rows=mean(series.STEP_ROWS),
        phase_s={phase: since(series.STEP_PHASE, "_sum", phase=phase) for phase in phases},
        prefill_tokens=int(since(series.PREFILL_TOKENS)),
        decode_tokens=int(since(series.DECODE_TOKENS)),
        queue_s=mean(series.QUEUE),
        adapter_wait_s=mean(series.ADAPTER_WAIT),
        adapter_loads=int(since(series.ADAPTER_LOADS)),
        adapter_load_s=since(series.ADAPTER_LOAD, "_sum"),
        adapter_evictions=int(since(series.ADAPTER_EVICTIONS)),
        preemptions=int(since(series.PREEMPTIONS)),
        prefix_hit_tokens=int(since(series.PREFIX_HIT_TOKENS)),
    )
