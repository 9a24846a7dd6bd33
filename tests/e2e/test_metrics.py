"""A real server's page, against what was really sent."""

from __future__ import annotations

import contextlib
import re
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from support.grpc_harness import ask_once
from support.metrics_page import Page, scrape, scrape_until

from gralora.v1 import generation_pb2_grpc
from gralora_server import Client
from gralora_server.client import NotFoundError

from .conftest import announced, assert_idle

ADAPTERS = ("a0", "a1", "a2")
SENT = {"a0": 2, "a1": 1, "": 1}  # requests by adapter
NUM_PROMPT, NUM_OUTPUT = 21, 7


@pytest.fixture
def server(tiny_workspace: Path) -> Iterator[tuple[Client, str]]:
    """A fresh one, so that its counts are only of what a test sends. No prefix cache: prompts are computed whole."""
    options = ("--threads", "1", "--max-num-seqs", "2", "--no-prefix-cache", "--metrics-address", "127.0.0.1:0")
    with (
        announced(tiny_workspace / "model", tiny_workspace / "adapters", *options) as said,
        Client(said["address"]) as client,
    ):
        yield client, said["metrics_address"]


def ended(page: Page) -> dict[str, float]:
    return {s.labels["outcome"]: s.value for s in page.samples if s.name == "gralora_requests_ended_total"}


def send(client: Client) -> None:
    for adapter, count in SENT.items():
        for index in range(count):
            prompt = [5 + index, *range(10, 10 + NUM_PROMPT - 1)]
            client.generate(token_ids=prompt, adapter=adapter, max_tokens=NUM_OUTPUT, ignore_eos=True)


def test_the_page_counts_exactly_what_was_sent(server: tuple[Client, str]) -> None:
    client, address = server
    before = scrape(address)
    send(client)
    with pytest.raises(NotFoundError):
        client.generate("hello", adapter="nobody", max_tokens=1)
    page = scrape(address)
    requests = sum(SENT.values())

    assert before("gralora_requests_received_total") == 0
    assert before("gralora_adapters", state="registered") >= len(ADAPTERS)
    assert before("gralora_server_phase", phase="serving") == 1
    assert page("gralora_requests_received_total") == requests + 1
    assert ended(page) == {"length": requests, "adapter_not_found": 1}
    assert page("gralora_prefill_tokens_total") == requests * NUM_PROMPT
    assert page("gralora_generated_tokens_total") == requests * NUM_OUTPUT
    assert page("gralora_decode_tokens_total") == requests * (NUM_OUTPUT - 1)
    for name in ("time_to_first_token", "request", "request_queue"):
        assert page(f"gralora_{name}_seconds_count") == requests
        assert page(f"gralora_{name}_seconds_bucket", le="+Inf") == requests
    assert page("gralora_inter_token_seconds_count") == requests * (NUM_OUTPUT - 1)
    assert page("gralora_request_adapter_wait_seconds_count") == requests - SENT[""]
    for adapter, count in SENT.items():
        label = adapter or "(base)"
        assert page("gralora_adapter_requests_total", adapter=label) == count
        assert page("gralora_adapter_prompt_tokens_total", adapter=label) == count * NUM_PROMPT
        assert page("gralora_adapter_generated_tokens_total", adapter=label) == count * NUM_OUTPUT
    assert "nobody" not in page.text


def test_step_histograms_hold_every_step_and_every_token(server: tuple[Client, str]) -> None:
    client, address = server
    send(client)
    # The last step's handing over is timed when it is over: the client may have its answer before.
    delivered = "gralora_step_phase_seconds_count"
    page = scrape_until(address, lambda page: page(delivered, phase="deliver") == page("gralora_steps_total"))
    steps = page("gralora_steps_total")

    assert steps == sum(SENT.values()) * NUM_OUTPUT  # one at a time, and a prompt is one step
    assert page("gralora_step_rows_count") == steps
    assert page("gralora_step_rows_sum") == steps
    assert page("gralora_step_tokens_sum") == (
        page("gralora_prefill_tokens_total") + page("gralora_decode_tokens_total")
    )
    phases = ("schedule", "build", "forward", "sample", "commit")
    assert {phase: page("gralora_step_phase_seconds_count", phase=phase) for phase in phases} == dict.fromkeys(
        phases, steps
    )
    assert page("gralora_step_phase_seconds_count", phase="deliver") == steps
    assert page("gralora_step_phase_seconds_sum", phase="forward") > 0


def test_gateways_see_who_runs_and_who_waits_in_one_series_that_changes(server: tuple[Client, str]) -> None:
    client, address = server
    for adapter in ADAPTERS:  # who is loaded first would be admitted first
        client.adapters.load(adapter)
    with contextlib.ExitStack() as stack:
        streams = [
            stack.enter_context(client.stream("hello", adapter=adapter, max_tokens=450, ignore_eos=True))
            for adapter in ADAPTERS
        ]
        for stream in streams[:2]:
            next(stream)
        wanted = {"max_lora": "2", "running_lora_adapters": "a0,a1", "waiting_lora_adapters": "a2"}
        crowded = scrape_until(address, lambda page: page.labels("vllm:lora_requests_info") == [wanted])
        seen_s = time.time()
    # A request leaves the batch before the event loop has counted its end: the later one is waited for.
    idle = scrape_until(address, lambda page: sum(ended(page).values()) == len(ADAPTERS))
    assert_idle(client)

    assert crowded("vllm:num_requests_running") == 2
    assert crowded("vllm:num_requests_waiting") == 1
    assert 0 < crowded("vllm:kv_cache_usage_perc") < 1
    assert abs(crowded("vllm:lora_requests_info") - seen_s) < 10
    assert crowded("gralora_adapter_leases") == 3
    nobody = {"max_lora": "2", "running_lora_adapters": "", "waiting_lora_adapters": ""}
    assert scrape(address).labels("vllm:lora_requests_info") == [nobody]
    assert idle("vllm:num_requests_running") == 0
    assert idle("vllm:kv_cache_usage_perc") == 0
    assert set(ended(idle)) <= {"cancelled", "length"}
    assert sum(ended(idle).values()) == len(ADAPTERS)


def test_residency_follows_loads_and_unloads(server: tuple[Client, str]) -> None:
    client, address = server
    for adapter in ADAPTERS[:2]:
        client.generate("hello", adapter=adapter, max_tokens=1)
    here = scrape(address)
    size = {adapter.name: adapter.pool_bytes for adapter in client.adapters.list()}
    freed = client.adapters.unload("a0")
    gone = scrape_until(address, lambda page: page("gralora_adapter_slots", state="used") == 1)

    assert here("gralora_adapters", state="resident") == 2
    assert here("gralora_adapter_bytes", tier="pool") == size["a0"] + size["a1"]
    assert here("gralora_adapter_resident_bytes", adapter="a0", tier="pool") == size["a0"] == freed.pool_bytes_freed
    assert here("gralora_adapter_loads_total") == 2
    assert here("gralora_adapter_load_seconds_count") == 2
    assert here("gralora_adapter_placements_total") == 2
    assert here("gralora_adapter_evictions_total") == 0
    assert gone("gralora_adapters", state="resident") == 1
    assert gone("gralora_adapter_bytes", tier="pool") == size["a1"]
    assert [labels["adapter"] for labels in gone.labels("gralora_adapter_resident_bytes")] == ["a1"]
    assert gone("gralora_adapter_requests_total", adapter="a0") == 1  # a counter does not go back
    client.adapters.load("a0")


TRACE = "0af7651916cd43dd8448eb211c80319c"
EXEMPLAR = re.compile(r'gralora_time_to_first_token_seconds_bucket\{le="[^"]+"\} [\d.]+ # \{([^}]*)\} [\d.]+ [\d.]+')
LABEL = re.compile(r'(\w+)="([^"]*)"')


@pytest.mark.parametrize(("flags", "trace"), [("01", {"trace_id": TRACE}), ("00", {})])
def test_an_exemplar_leads_to_its_callers_trace_if_that_is_sampled(
    tiny_workspace: Path, flags: str, trace: dict[str, str]
) -> None:
    """Nobody collects at that port, which holds nobody up."""
    options = ("--threads", "1", "--metrics-address", "127.0.0.1:0", "--otlp-endpoint", "http://127.0.0.1:9")
    with (
        announced(tiny_workspace / "model", tiny_workspace / "adapters", *options) as said,
        grpc.insecure_channel(said["address"]) as channel,
    ):
        metadata = (("traceparent", f"00-{TRACE}-b7ad6b7169203331-{flags}"),)
        generation_pb2_grpc.GenerationServiceStub(channel).Generate(ask_once("asked"), metadata=metadata)
        page = urllib.request.Request(
            f"http://{said['metrics_address']}/metrics", headers={"Accept": "application/openmetrics-text"}
        )
        with urllib.request.urlopen(page, timeout=10) as answer:
            (labels,) = EXEMPLAR.findall(answer.read().decode())

    assert dict(LABEL.findall(labels)) == {"request_id": "asked"} | trace
