"""What customers know they were served, against what the server says that they were."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.soak.traffic import Sent
from gralora_server.client import TenantUsage
from gralora_server.loadtest.metrics_page import Page
from gralora_server.metrics import series

Tokens = tuple[int, int]  # of prompts, of outputs


@dataclass(frozen=True, slots=True)
class Bill:
    """One tenant's. `page`: the same by the metrics page."""

    charged: Tokens
    at_least: Tokens
    at_most: Tokens
    page: Tokens

    @property
    def problems(self) -> list[str]:
        found = []
        for what, charged, low, high, page in zip(
            ("prompt", "output"), self.charged, self.at_least, self.at_most, self.page, strict=True
        ):
            if not low <= charged <= high:
                found.append(f"{charged} {what} tokens were counted, between {low} and {high} were served")
            if charged != page:
                found.append(f"{charged} {what} tokens by GetUsage, {page} by the metrics page")
        return found


def bills(sent: Sequence[Sent], usage: Iterable[TenantUsage], page: Page) -> dict[str, Bill]:
    """Of all tenants that sent something."""
    charged: defaultdict[str, list[Tokens]] = defaultdict(list)
    for row in usage:
        charged[row.tenant].append((row.prompt_tokens, row.output_tokens))
    return {
        tenant: Bill(
            charged=_sum(charged[tenant]),
            at_least=_sum(one.at_least for one in sent if one.tenant == tenant),
            at_most=_sum(one.at_most for one in sent if one.tenant == tenant),
            page=(
                int(page.value(series.BY_TENANT_PROMPT, tenant=tenant)),
                int(page.value(series.BY_TENANT_OUTPUT, tenant=tenant)),
            ),
        )
        for tenant in sorted({one.tenant for one in sent})
    }


def problems_of(found: Mapping[str, Bill]) -> list[str]:
    return [f"{tenant}: {problem}" for tenant, bill in found.items() for problem in bill.problems]


def _sum(of: Iterable[Tokens]) -> Tokens:
    prompts, outputs = 0, 0
    for prompt, output in of:
        prompts, outputs = prompts + prompt, outputs + output
    return prompts, outputs
