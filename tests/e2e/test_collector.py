"""Spans in a real collector, Arize's Phoenix, unmodified: `make collector-test` installs it."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx2
import pytest
from support.grpc_harness import ask_once
from support.prometheus import free_port

from e2e.conftest import announced
from gralora.v1 import generation_pb2, generation_pb2_grpc

PHOENIX = Path(
    os.environ.get("GRALORA_TEST_PHOENIX", Path(__file__).parent.parent.parent / ".venv-phoenix" / "bin" / "phoenix")
)
PATIENCE_S = 60.0
GRPC_TRACE, HTTP_TRACE = "0af7651916cd43dd8448eb211c80319c", "4bf92f3577b34da6a3ce929d0e0e4736"
CALLER = "b7ad6b7169203331"


@dataclass(frozen=True, slots=True)
class Collector:
    """`endpoint` takes spans, `pages` shows them."""

    endpoint: str
    pages: str

    def spans(self, trace: str) -> dict[str, dict[str, Any]]:
        """Of one trace, by name, once all have come."""
        end_s = time.monotonic() + PATIENCE_S
        while True:
            answer = httpx2.get(f"{self.pages}/v1/projects/default/spans", params={"limit": 1000}, timeout=PATIENCE_S)
            found = {span["name"]: span for span in answer.json()["data"] if span["context"]["trace_id"] == trace}
            if "delivery" in found and any(span["parent_id"] == CALLER for span in found.values()):
                return found
            assert time.monotonic() < end_s, f"no such trace: {answer.text[:500]}"
            time.sleep(0.2)


@pytest.fixture(scope="module")
def collector(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Collector]:
    if not PHOENIX.exists():
        pytest.skip(f"{PHOENIX} is not there: make collector-test")
    folder, port, pages = tmp_path_factory.mktemp("phoenix"), free_port(), free_port()
    environment = os.environ | {
        "PHOENIX_WORKING_DIR": str(folder), "PHOENIX_HOST": "127.0.0.1", "PHOENIX_PORT": str(pages),
        "PHOENIX_GRPC_PORT": str(port), "PHOENIX_TELEMETRY_ENABLED": "false",
    }  # fmt: skip
    made = Collector(f"http://127.0.0.1:{port}", f"http://127.0.0.1:{pages}")
    with (
        (folder / "log").open("w") as log,
        subprocess.Popen([PHOENIX, "serve"], env=environment, stdout=log, stderr=log) as process,
    ):
        try:
            wait_until_it_answers(made, folder / "log")
            yield made
        finally:
            process.terminate()


def wait_until_it_answers(collector: Collector, log: Path) -> None:
    end_s = time.monotonic() + PATIENCE_S
    while not answers(collector):
        assert time.monotonic() < end_s, log.read_text()
        time.sleep(0.2)


def answers(collector: Collector) -> bool:
    try:
        return httpx2.get(f"{collector.pages}/healthz", timeout=PATIENCE_S).is_success
    except httpx2.HTTPError:
        return False


def test_a_grpc_and_an_http_call_are_in_their_callers_traces(collector: Collector, tiny_workspace: Path) -> None:
    options = ("--threads", "1", "--http-address", "127.0.0.1:0", "--otlp-endpoint", collector.endpoint)
    with announced(tiny_workspace / "model", tiny_workspace / "adapters", *options, "--trace-sampling", "0") as server:
        with grpc.insecure_channel(server["address"]) as channel:
            stub = generation_pb2_grpc.GenerationServiceStub(channel)
            request = ask_once("by-grpc", adapter="a0", stopping=generation_pb2.StoppingParams(max_tokens=5))
            stub.Generate(request, metadata=(("traceparent", f"00-{GRPC_TRACE}-{CALLER}-01"),), timeout=PATIENCE_S)
        body = {"model": "a1", "prompt": "hello there", "max_tokens": 5}
        headers = {"traceparent": f"00-{HTTP_TRACE}-{CALLER}-01", "X-Request-Id": "by-http"}
        url = f"http://{server['http_address']}/v1/completions"
        httpx2.post(url, json=body, headers=headers, timeout=PATIENCE_S).raise_for_status()

        for trace, adapter, request_id in ((GRPC_TRACE, "a0", "by-grpc"), (HTTP_TRACE, "a1", "by-http")):
            spans = collector.spans(trace)
            whole = spans.pop(f"text_completion {adapter}")
            assert whole["parent_id"] == CALLER
            assert whole["attributes"]["gralora.request_id"] == request_id
            assert whole["attributes"]["gen_ai.response.model"] == f"{adapter}@1"
            assert {"tokenize", "prefill", "decode"} <= spans.keys()
            assert {span["parent_id"] for span in spans.values()} == {whole["context"]["span_id"]}
            assert "hello" not in str(spans) + str(whole)
