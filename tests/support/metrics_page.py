"""What a metrics page says, as numbers."""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Callable

from prometheus_client.parser import text_string_to_metric_families


class Page:
    """One scrape. `page(name, label=value)` is the value of the one series that fits, 0 if there is none."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]

    def __call__(self, name: str, **labels: str) -> float:
        found = [s.value for s in self.samples if s.name == name and labels.items() <= s.labels.items()]
        assert len(found) <= 1, f"{name} {labels} fits {len(found)} series"
        return found[0] if found else 0.0

    def labels(self, name: str) -> list[dict[str, str]]:
        return [sample.labels for sample in self.samples if sample.name == name]


def scrape(address: str) -> Page:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
        return Page(answer.read().decode())


def scrape_until(address: str, condition: Callable[[Page], bool], timeout_s: float = 20.0) -> Page:
    deadline_s = time.monotonic() + timeout_s
    while not condition(page := scrape(address)):
        assert time.monotonic() < deadline_s, page.text
        time.sleep(0.01)
    return page
