"""`gralora top`: a server at work, in a terminal: what the live page shows, by gRPC."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer
from rich.live import Live

from gralora_server.cli.output import stdout
from gralora_server.cli.remote import needs_server
from gralora_server.cli.top_screen import Screen, draw

if TYPE_CHECKING:
    from gralora_server.client import Adapter, Client

SLOW_S = 5.0  # between two looks at what is long or rarely new
MAX_ADAPTERS = 8


@needs_server
def top(
    client: Client,
    *,
    interval_s: Annotated[float, typer.Option(min=0.2, help="Between two looks.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Print what two looks show, and end.")] = False,
) -> None:
    """Show a server at work until Ctrl-C: requests and why they wait, delays, adapters, tenants. For an admin."""
    console, watch = stdout(), Watch(client)
    if once or not console.is_terminal:
        watch.look()
        time.sleep(interval_s)
        console.print(draw(watch.look(), height=None))
        return
    try:
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                live.update(draw(watch.look(), height=console.height), refresh=True)
                time.sleep(interval_s)
    except KeyboardInterrupt:
        return


class Watch:
    """What was seen so far of one server."""

    def __init__(self, client: Client) -> None:
        from gralora_server.live.history import History
        from gralora_server.live.rates import Rates

        self._client = client
        self._info = client.info()
        self._history = History()
        self._adapter_rates, self._tenant_rates = Rates(), Rates()
        self._used: dict[str, int] = {}  # output tokens by tenant
        self._adapters: dict[str, Adapter] = {}
        self._slow_s = -SLOW_S

    def look(self) -> Screen:
        """At what is so now."""
        found, now_s = self._client.activity(), time.monotonic()
        self._history.note(time.time(), found.activity)
        traffic = {account: tally.generated_tokens for account, tally in found.activity.adapters.items()}
        rates = self._adapter_rates.look(traffic, now_s)
        busiest = sorted(filter(None, traffic), key=lambda one: (-rates.get(one, 0.0), -traffic[one]))[:MAX_ADAPTERS]
        if now_s - self._slow_s >= SLOW_S:
            self._slow_s = now_s
            self._look_closely(busiest)
        return Screen(
            info=self._info,
            load=found.activity.load,
            points=self._history.points(0.0),
            phases=self._history.step_phases(),
            requests=sorted(found.requests, key=lambda one: -one.age_s),
            traffic={account: found.activity.adapters[account] for account in busiest},
            adapters=self._adapters,
            adapter_rates=rates,
            used=self._used,
            tenant_rates=self._tenant_rates.look(self._used, now_s),
        )

    def _look_closely(self, accounts: list[str]) -> None:
        from gralora_server.client import GraloraClientError

        self._used = {}
        for row in self._client.usage():
            self._used[row.tenant] = self._used.get(row.tenant, 0) + row.output_tokens
        for account in accounts:
            try:
                self._adapters[account] = self._client.adapters.get(account.rpartition("@")[0] or account)
            except GraloraClientError:  # a mix, all others together, or gone meanwhile
                self._adapters.pop(account, None)
