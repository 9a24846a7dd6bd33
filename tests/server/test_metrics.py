"""The page: what it says while the model loads and afterwards, and that nothing a name holds can break it."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.parser import text_string_to_metric_families
from support.fake_engine import INFO, FakeEngine, snapshot

from gralora_runtime.errors import ConfigError
from gralora_runtime.observation.histogram import Owner
from gralora_runtime.observation.requests import RequestObservation
from gralora_runtime.observation.snapshot import EngineSnapshot
from gralora_server.config import MetricsConfig, ServerConfig
from gralora_server.gate import Gate
from gralora_server.metrics import series
from gralora_server.metrics.collector import EngineCollector
from gralora_server.metrics.page import MetricsPage
from gralora_server.metrics.table import table
from gralora_server.metrics.tenants import TenantCollector
from gralora_server.service import serve
from gralora_server.tenants.request_ids import scoped
from gralora_server.tenants.usage import Counts, Usage

DOC = Path(__file__).parent.parent.parent / "docs" / "metrics.md"
TRACE = "0af7651916cd43dd8448eb211c80319c"
LOOPBACK = MetricsConfig(host="127.0.0.1", port=0)


class Seen(FakeEngine):
    """An engine whose snapshot a test chooses."""

    def __init__(self, seen: EngineSnapshot) -> None:
        super().__init__()
        self.seen = seen

    def snapshot(self) -> EngineSnapshot:
        return self.seen


def page_of(seen: EngineSnapshot | None, usage: Usage | None = None) -> str:
    gate, registry = Gate(), CollectorRegistry()
    if seen is not None:
        gate.open(Seen(seen))
    registry.register(EngineCollector(gate))
    registry.register(TenantCollector(usage or Usage()))
    return generate_latest(registry).decode()


def samples(page: str, name: str) -> dict[tuple[str, ...], float]:
    """Values of one series by its labels' values."""
    return {
        tuple(sample.labels.values()): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if sample.name == name
    }


def get(port: int, headers: dict[str, str] | None = None) -> str:
    request = urllib.request.Request(f"http://127.0.0.1:{port}/metrics", headers=headers or {})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return answer.read().decode()


async def test_every_series_of_the_table_is_on_the_page_and_no_other() -> None:
    families = {family.name: family for family in text_string_to_metric_families(page_of(snapshot()))}

    assert {one.name.removesuffix("_total") for one in series.ALL} == set(families)
    for one in series.ALL:
        family = families[one.name.removesuffix("_total")]
        assert (family.type, family.documentation) == (one.kind, one.text)
        assert {name for sample in family.samples for name in sample.labels} - {"le"} <= set(one.labels)


def test_the_documentation_has_the_table_as_it_is() -> None:
    assert table() in DOC.read_text(), "docs/metrics.md is stale: python scripts/metrics_table.py"


async def test_numbers_go_where_their_names_say() -> None:
    page = page_of(snapshot())
    expected = {
        "gralora_requests_running": {(): 1.0},
        "gralora_requests_waiting": {(): 2.0},
        "gralora_requests_preparing": {(): 3.0},
        "gralora_kv_pages": {("free",): 50.0, ("cached",): 20.0, ("leased",): 30.0},
        "gralora_steps_total": {(): 7.0},
        "gralora_generated_tokens_total": {(): 8.0},
        "gralora_preemptions_total": {(): 9.0},
        "gralora_requests_paused": {(): 13.0},
        "gralora_pauses_total": {(): 12.0},
        "gralora_prefix_hit_tokens_total": {(): 10.0},
        "gralora_internal_failures_total": {("request",): 2.0, ("step",): 1.0},
        "gralora_prefill_tokens_total": {(): 15.0},
        "gralora_decode_tokens_total": {(): 16.0},
        "gralora_adapter_bytes": {("pool",): 6.0, ("host",): 7.0},
        "gralora_adapter_capacity_bytes": {("pool",): 2.0**30, ("host",): 2.0**29},
        "gralora_adapter_slots": {("used",): 5.0, ("free",): 4091.0},
        "gralora_adapter_loads_total": {(): 11.0},
        "gralora_adapter_load_failures_total": {(): 12.0},
        "gralora_adapter_placements_total": {(): 13.0},
        "gralora_adapter_evictions_total": {(): 14.0},
        "gralora_adapter_moves_total": {(): 3.0},
        "gralora_adapter_resident_bytes": {("poet", "pool", "1"): 1200.0, ("bard", "host", "2"): 1300.0},
        "vllm:num_requests_running": {(): 1.0},
        "vllm:num_requests_waiting": {(): 5.0},
        "vllm:kv_cache_usage_perc": {(): 0.3},
    }

    assert {name: samples(page, name) for name in expected} == expected


async def test_tenants_are_told_apart_up_to_a_number() -> None:
    usage = Usage(max_named_tenants=2)
    for tenant in ("", "acme", "b", "c"):
        usage.add(tenant, "poet", Counts(1, 2, 3, 4, 0, 6))
        usage.refuse(tenant, "poet")
    page = page_of(None, usage)
    expected = {
        "gralora_tenant_requests_total": 1.0,
        "gralora_tenant_prompt_tokens_total": 2.0,
        "gralora_tenant_cached_tokens_total": 3.0,
        "gralora_tenant_output_tokens_total": 4.0,
        "gralora_tenant_refused_total": 1.0,
        "gralora_tenant_upload_bytes_total": 6.0,
    }

    for name, value in expected.items():
        assert samples(page, name) == {("(operator)",): value, ("acme",): value, ("(others)",): 2 * value}


async def test_gateways_find_one_lora_series_with_both_lists_and_the_time() -> None:
    asked_s = time.time()
    (labels, value), *others = samples(page_of(snapshot()), "vllm:lora_requests_info").items()

    assert others == []
    assert labels == (str(INFO.max_num_seqs), "bard,poet", "cold")
    assert asked_s <= value <= time.time()


async def test_the_model_may_take_fewer_adapters_than_rows() -> None:
    page = page_of(snapshot(info=replace(INFO, max_adapter_slots=3)))

    assert [labels[0] for labels in samples(page, "vllm:lora_requests_info")] == ["3"]


async def test_no_name_can_break_out_of_its_label() -> None:
    """Names of adapters are checked long before; this is the second lock on the door."""
    name = 'x"} 1\nevil_total{a="\\'
    observed = RequestObservation(100)
    observed.accounts.use(name)
    page = page_of(snapshot(observed, running_adapters=frozenset({name})))

    assert samples(page, "gralora_adapter_requests_total")[name, ""] == 1
    assert not any(line.startswith("evil") for line in page.splitlines())
    assert [labels[1] for labels in samples(page, "vllm:lora_requests_info")] == [name]


async def test_the_page_stays_small_with_ten_thousand_adapters() -> None:
    observed = RequestObservation(100)
    for index in range(10_000):
        observed.accounts.use(f"acme/a{index}@main@3")
    counted = samples(page_of(snapshot(observed)), "gralora_adapter_requests_total")

    assert len(counted) == 100 + 2
    assert sum(counted.values()) == 10_000
    assert counted["other", ""] == 10_000 - 100
    assert {labels for labels in counted if labels[0].startswith("acme/")} <= {
        (f"acme/a{i}@main", "3") for i in range(10_000)
    }


async def test_a_mix_has_the_names_and_versions_of_its_adapters_as_labels() -> None:
    observed = RequestObservation(100)
    for label in ("org/poet@main@3+pirate@12", "pirate@12", ""):
        observed.accounts.use(label)
    counted = samples(page_of(snapshot(observed)), "gralora_adapter_requests_total")

    assert counted["org/poet@main+pirate", "3+12"] == counted["pirate", "12"] == counted["(base)", ""] == 1


async def test_the_page_is_there_while_the_model_loads_while_it_drains_and_no_longer() -> None:
    loading, port = asyncio.Event(), asyncio.get_running_loop().create_future()
    serving = asyncio.Event()
    engine = FakeEngine()

    async def factory() -> FakeEngine:
        await loading.wait()
        return engine

    config = ServerConfig(port=0, metrics=LOOPBACK)
    running = serve(config, factory, on_metrics=port.set_result, on_serving=lambda _: serving.set())
    task = asyncio.ensure_future(running)
    at = await asyncio.wait_for(port, 10)
    before = await asyncio.to_thread(get, at)
    loading.set()
    await serving.wait()
    during = await asyncio.to_thread(get, at)
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.wait_for(task, 10)

    assert samples(before, "gralora_server_phase")["starting",] == 1
    assert samples(before, "process_resident_memory_bytes")[()] > 0
    assert "vllm:" not in before
    assert samples(during, "gralora_server_phase")["serving",] == 1
    assert samples(during, "vllm:num_requests_running") == {(): 1.0}
    with pytest.raises(urllib.error.URLError):
        await asyncio.to_thread(get, at)


async def test_a_port_that_is_taken_is_refused_before_the_model_loads() -> None:
    async def factory() -> FakeEngine:
        raise AssertionError("the model was loaded")

    with socket.create_server(("127.0.0.1", 0)) as taken:
        config = MetricsConfig(host="127.0.0.1", port=taken.getsockname()[1])
        with pytest.raises(ConfigError, match=rf"cannot serve metrics on 127\.0\.0\.1:{config.port}"):
            await asyncio.wait_for(serve(ServerConfig(port=0, metrics=config), factory), 10)


def test_a_port_that_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="metrics port"):
        MetricsConfig(host="127.0.0.1", port=65536)


PROMETHEUS_2 = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
PROMETHEUS_3 = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,"
    "text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,*/*;q=0.1"
)


@pytest.mark.parametrize("accepted", [PROMETHEUS_2, PROMETHEUS_3, "text/plain", "*/*", ""])
async def test_names_keep_their_colon_whatever_format_the_scraper_asks_for(accepted: str) -> None:
    """As OpenMetrics they lost it, and Prometheus, which asks for that first, had none of the gateways' series."""
    gate = Gate()
    gate.open(FakeEngine())
    page = MetricsPage(LOOPBACK, gate, Usage())
    try:
        text = await asyncio.to_thread(get, page.port, {"Accept": accepted})
    finally:
        await asyncio.to_thread(page.close)

    assert "\nvllm:num_requests_running 1.0\n" in text
    assert "vllm_" not in text
    assert text.endswith("# EOF\n") is ("openmetrics" in accepted)


async def test_both_formats_have_the_same_series() -> None:
    gate, registry = Gate(), CollectorRegistry()
    gate.open(Seen(snapshot()))
    registry.register(EngineCollector(gate))
    registry.register(TenantCollector(Usage()))
    classic, modern = generate_latest(registry).decode(), openmetrics.generate_latest(registry, "allow-utf-8").decode()
    lines = [{line.rpartition(" ")[0] for line in text.splitlines() if line[0] != "#"} for text in (classic, modern)]

    assert lines[0] == lines[1]
    assert len(lines[0]) > 200


async def test_a_bucket_has_the_last_request_that_fell_into_it_and_its_trace_as_far_as_there_is_room() -> None:
    observed = RequestObservation(10)
    for whose, waited_s in (
        (Owner("first", TRACE), 0.3),
        (Owner(scoped("acme", "second")), 0.4),
        (Owner("slow", TRACE), 9.0),
        (Owner("x" * 200, TRACE), 20.0),
        (Owner("x" * 200), 40.0),
    ):
        observed.first_token.observe(waited_s, whose=whose)
    gate, registry = Gate(), CollectorRegistry()
    gate.open(Seen(snapshot(observed)))
    registry.register(EngineCollector(gate))
    text = openmetrics.generate_latest(registry, "allow-utf-8").decode()
    found = dict(
        re.findall(r'gralora_time_to_first_token_seconds_bucket\{le="([^"]+)"\} \d+\.0 # (\{[^}]*\} [\d.]+) ', text)
    )

    assert found == {
        "0.5": '{request_id="second"} 0.4',
        "10.0": f'{{request_id="slow",trace_id="{TRACE}"}} 9.0',
        "25.0": f'{{trace_id="{TRACE}"}} 20.0',
    }


async def test_a_client_that_sends_nothing_holds_up_no_other() -> None:
    page = MetricsPage(LOOPBACK, Gate(), Usage())
    try:
        with socket.create_connection(("127.0.0.1", page.port)):
            text = await asyncio.to_thread(get, page.port)
    finally:
        await asyncio.to_thread(page.close)

    assert "gralora_build_info" in text


@pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed (Debian: apt install prometheus)"
)
def test_promtool_finds_no_fault_but_the_colon_in_the_names_that_gateways_want() -> None:
    page = page_of(snapshot())
    whole, ours = (
        subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True, check=False)
        for text in (page, re.sub(r"(?m)^.*vllm:.*\n", "", page))
    )
    complaints = (whole.stdout + whole.stderr).splitlines()

    assert (ours.returncode, ours.stdout, ours.stderr) == (0, "", "")
    assert len(complaints) == 4
    assert all(re.match(r"vllm:\w+ metric names should not contain ':'", line) for line in complaints)
