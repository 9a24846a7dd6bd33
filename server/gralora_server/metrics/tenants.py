"""What tenants used since the start, as the page's series. Bills are made of `GetUsage`, which outlives the server."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from gralora_server.metrics import series
from gralora_server.tenants.usage import Usage

OPERATOR_LABEL = "(operator)"  # no tenant can be called that, and an empty label would be no label
OTHERS_LABEL = "(others)"


class TenantCollector(Collector):
    """Reads in the scrape's own thread, and keeps nothing between two."""

    def __init__(self, usage: Usage) -> None:
        self._usage = usage

    def collect(self) -> Iterator[Metric]:
        named, others = self._usage.since_start()
        used = {tenant or OPERATOR_LABEL: counts for tenant, counts in named.items()} | {OTHERS_LABEL: others}
        yield series.BY_TENANT_REQUESTS.by({tenant: counts.requests for tenant, counts in used.items()})
        yield series.BY_TENANT_PROMPT.by({tenant: counts.prompt_tokens for tenant, counts in used.items()})
        yield series.BY_TENANT_CACHED.by({tenant: counts.cached_tokens for tenant, counts in used.items()})
        yield series.BY_TENANT_OUTPUT.by({tenant: counts.output_tokens for tenant, counts in used.items()})
        yield series.BY_TENANT_REFUSED.by({tenant: counts.refused for tenant, counts in used.items()})
        yield series.BY_TENANT_UPLOADED.by({tenant: counts.upload_bytes for tenant, counts in used.items()})
