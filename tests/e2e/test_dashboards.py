"""Every query of the dashboards and every rule is asked of a Prometheus that scrapes a loaded server, and answered."""

from __future__ import annotations

import asyncio
import json
import math
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import grafana_dashboards
import pytest
import yaml
from support.prometheus import NEEDED, asked, prometheus, query, until, value

from gralora_server import Client
from gralora_server.client import AsyncClient, ResourceExhaustedError
from gralora_server.metrics import series

from .conftest import announced

DEPLOY = Path(__file__).parent.parent.parent / "deploy"
RULES = DEPLOY / "prometheus" / "rules.yml"
RULES_TEST = RULES.with_name("rules_test.yml")
DASHBOARDS = sorted((DEPLOY / "grafana").glob("*.json"))
SELECTOR = re.compile(r"\b(?:gralora_|instance:|up\b)[\w:]*(?:\{[^}]*\})?")
PROMPT = "the quick brown fox jumps over the lazy dog " * 3  # of more than a page, so that the prefix cache has it
PROMTOOL = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed (apt install prometheus)"
)


def rules(kind: str) -> dict[str, str]:
    """Expressions by name, of alerts (`alert`) or recording rules (`record`)."""
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return {rule[kind]: rule["expr"] for group in groups for rule in group["rules"] if kind in rule}


def queries(dashboard: Path) -> dict[str, str]:
    """By panel and letter, as Grafana would send them for all servers."""
    found = json.loads(dashboard.read_text())
    return {
        f"{panel['title']} {target['refId']}": target["expr"]
        .replace("$__rate_interval", "1m")
        .replace("$instance", ".*")
        for panel in found["panels"]
        for target in panel["targets"]
    }


def load(address: str) -> None:
    """Three adapters and the base model, side by side, the same prompt time and again."""

    def ask(adapter: str) -> None:
        with Client(address) as client:
            for _ in range(4):
                client.generate(PROMPT, adapter=adapter, max_tokens=20, ignore_eos=True)

    askers = [threading.Thread(target=ask, args=(adapter,)) for adapter in ("", "a0", "a1", "a2")]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join()


async def flood(address: str) -> None:
    """More at once than there are places."""

    async def ask(client: AsyncClient) -> None:
        with suppress(ResourceExhaustedError):
            await client.generate("x", max_tokens=200, ignore_eos=True)

    async with AsyncClient(address) as client:
        await asyncio.gather(*(ask(client) for _ in range(24)))


@pytest.fixture(scope="module")
def loaded(tiny_workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Prometheus that has seen a server at work, and refuse."""
    options = ("--threads", "1", "--max-num-seqs", "4", "--max-queue", "4", "--metrics-address", "127.0.0.1:0")
    with (
        announced(tiny_workspace / "model", tiny_workspace / "adapters", *options) as said,
        prometheus(tmp_path_factory.mktemp("prometheus"), said["metrics_address"], (RULES,)) as address,
    ):
        until(address, "up", 1)
        # What appears with its first event has no rate before its second one.
        while not value(address, 'rate(gralora_requests_ended_total{outcome="queue_full"}[1m])'):
            asyncio.run(flood(said["address"]))
            load(said["address"])
            until(address, "sum(gralora_requests_received_total) - sum(gralora_requests_ended_total)", 0)
        yield address


def numbers(result: list[dict[str, Any]]) -> list[float]:
    return [number for one in result if math.isfinite(number := float(one["value"][1]))]


@pytest.mark.parametrize("path", grafana_dashboards.files(), ids=lambda path: path.stem)
def test_dashboards_are_as_the_script_writes_them(path: Path) -> None:
    assert path.read_text() == grafana_dashboards.files()[path], "stale: python scripts/grafana_dashboards.py"


def test_a_click_on_an_exemplar_leads_to_its_trace() -> None:
    file = yaml.safe_load((DASHBOARDS[0].parent / "datasources.yaml").read_text())
    sources = {source["uid"]: source for source in file["datasources"]}
    (destination,) = sources["prometheus"]["jsonData"]["exemplarTraceIdDestinations"]

    assert destination["name"] == series.TRACE_ID
    assert sources[destination["datasourceUid"]]["type"] == "tempo"


def test_no_other_dashboard_lies_beside_them() -> None:
    assert set(DASHBOARDS) == set(grafana_dashboards.files())


@NEEDED
@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda path: path.stem)
def test_every_query_of_a_dashboard_has_an_answer(loaded: str, dashboard: Path) -> None:
    asked_for = queries(dashboard)
    deadline_s = time.monotonic() + 30  # for the scrapes after the load
    while silent := {name: q for name, q in asked_for.items() if not numbers(query(loaded, q))}:
        assert time.monotonic() < deadline_s, silent
        time.sleep(0.2)

    assert len(asked_for) >= 10


@NEEDED
def test_every_rule_is_evaluated_and_all_that_it_selects_is_there(loaded: str) -> None:
    alerts, records = rules("alert"), rules("record")
    selected = {found for expression in alerts.values() for found in SELECTOR.findall(expression)}
    deadline_s = time.monotonic() + 30
    while silent := {found for found in selected | set(records) if not numbers(query(loaded, found))}:
        assert time.monotonic() < deadline_s, silent
        time.sleep(0.2)
    states = [rule for group in asked(loaded, "rules")["groups"] for rule in group["rules"]]

    assert {rule["name"]: rule["health"] for rule in states} == dict.fromkeys([*alerts, *records], "ok")
    until(loaded, "instance:gralora_refused:ratio5m > bool 0", 1)


@NEEDED
def test_a_latency_leads_to_a_request_that_had_it(loaded: str) -> None:
    now_s = time.time()
    found = asked(
        loaded,
        "query_exemplars",
        query="gralora_time_to_first_token_seconds_bucket",
        start=str(now_s - 600),
        end=str(now_s),
    )
    examples = {one["labels"]["request_id"]: float(one["value"]) for each in found for one in each["exemplars"]}

    assert examples
    assert all(len(request_id) == 32 and 0 < value < 60 for request_id, value in examples.items())


def test_rules_and_dashboards_name_series_of_the_page_alone() -> None:
    """Where there is no Prometheus to ask."""
    names = {one.name for one in series.ALL}
    names |= {
        f"{one.name}_{part}" for one in series.ALL if one.kind == "histogram" for part in ("bucket", "sum", "count")
    }
    expressions = [*rules("alert").values(), *rules("record").values()]
    expressions += [q for path in DASHBOARDS for q in queries(path).values()]
    named = {found for q in expressions for found in re.findall(r"(?<![\w:])gralora_\w+", q)}

    assert named <= names
    assert len(named) > 30


@PROMTOOL
def test_promtool_accepts_the_rules_and_each_alert_fires_when_it_should_and_only_then() -> None:
    for command in (["check", "rules", RULES.name], ["test", "rules", RULES_TEST.name]):
        done = subprocess.run(
            ["promtool", *command], cwd=RULES.parent, capture_output=True, text=True, check=False, timeout=60
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_no_alert_is_untried() -> None:
    (tried,) = yaml.safe_load(RULES_TEST.read_text())["tests"]

    assert {one["alertname"] for one in tried["alert_rule_test"]} == set(rules("alert"))
