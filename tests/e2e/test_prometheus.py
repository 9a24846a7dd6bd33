"""Prometheus itself scrapes a loaded server, and answers questions about it."""

from __future__ import annotations

from pathlib import Path

from support.prometheus import NEEDED, prometheus, query, until, value

from gralora_server import Client

from .conftest import announced

NUM_OUTPUT = 40


@NEEDED
def test_prometheus_scrapes_a_loaded_server_and_answers_with_its_numbers(tiny_workspace: Path, tmp_path: Path) -> None:
    options = ("--threads", "1", "--max-num-seqs", "2", "--no-prefix-cache", "--metrics-address", "127.0.0.1:0")
    with (
        announced(tiny_workspace / "model", tiny_workspace / "adapters", *options) as said,
        Client(said["address"]) as client,
        prometheus(tmp_path, said["metrics_address"]) as address,
    ):
        until(address, "up", 1)
        until(address, "gralora_requests_received_total", 0)
        for adapter in ("a0", "a1", "a0"):
            client.generate("hello", adapter=adapter, max_tokens=NUM_OUTPUT, ignore_eos=True)
        until(address, 'gralora_requests_ended_total{outcome="length"}', 3)  # what is counted last

        assert value(address, "gralora_generated_tokens_total") == 3 * NUM_OUTPUT
        assert value(address, 'gralora_requests_ended_total{outcome="length"}') == 3
        assert value(address, 'gralora_adapter_generated_tokens_total{adapter="a0"}') == 2 * NUM_OUTPUT
        assert value(address, "gralora_time_to_first_token_seconds_count") == 3
        assert value(address, "histogram_quantile(0.95, gralora_time_to_first_token_seconds_bucket)") > 0
        assert len(query(address, "gralora_step_phase_seconds_count")) == 6
        assert len(query(address, "vllm:lora_requests_info")) == 1
        assert value(address, "time() - vllm:lora_requests_info") < 60
        assert value(address, "vllm:kv_cache_usage_perc") == 0
        until(address, "rate(gralora_generated_tokens_total[1m]) > bool 0", 1)
