"""Spans reach a collector in the trace of whoever called; and nothing is made of them where nobody asked for it."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from support.call_lines import call_lines
from support.fake_engine import FakeEngine, finished, token
from support.grpc_harness import ask_once, served
from support.http_harness import TEXT, http_served

from gralora_runtime.errors import ConfigError
from gralora_server.config import TracingConfig

trace_service_pb2 = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")
trace_service_pb2_grpc = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc")
pytest.importorskip("opentelemetry.exporter.otlp.proto.grpc")

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACED = f"00-{TRACE}-{SPAN}-01"
NOT_TRACED = f"00-{TRACE}-{SPAN}-00"


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """OTLP's own service, as a collector has it."""

    def __init__(self) -> None:
        self.spans: SimpleQueue[Any] = SimpleQueue()

    def Export(self, request: Any, _context: Any) -> Any:
        for resource in request.resource_spans:
            for scope in resource.scope_spans:
                for span in scope.spans:
                    self.spans.put(span)
        return trace_service_pb2.ExportTraceServiceResponse()


@contextmanager
def collecting() -> Iterator[SimpleNamespace]:
    """A collector on a port of its own. `spans` is what has come by the end of the block."""
    collector = Collector()
    server = grpc.server(futures.ThreadPoolExecutor(1))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    found = SimpleNamespace(endpoint=f"http://127.0.0.1:{port}", spans=[])
    try:
        yield found
    finally:
        server.stop(None).wait()
        while not collector.spans.empty():
            found.spans.append(collector.spans.get())


def attributes(span: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in span.attributes}


def engine() -> FakeEngine:
    made = FakeEngine()
    made.script = [token(1), finished()]
    return made


async def test_a_grpc_and_an_http_call_are_spans_of_their_callers_trace() -> None:
    with collecting() as collector:
        config = TracingConfig(endpoint=collector.endpoint, sampling=0.0)
        async with http_served(engine=engine(), tracing=config) as s:
            request = ask_once(adapter="poet")
            await s.grpc.client.generation.Generate(request, metadata=(("traceparent", TRACED),))
            body = TEXT | {"model": "bard"}
            await s.client.post("/v1/completions", json=body, headers={"traceparent": TRACED, "X-Request-Id": "r2"})

    whole = {attributes(span)["gralora.request_id"]: span for span in collector.spans if span.kind == 2}
    assert whole.keys() == {"r1", "r2"}
    assert {span.trace_id.hex() for span in collector.spans} == {TRACE}
    assert {span.parent_span_id.hex() for span in whole.values()} == {SPAN}
    by_grpc = attributes(whole["r1"])
    assert whole["r1"].name == "text_completion poet"
    assert (by_grpc["gen_ai.operation.name"], by_grpc["gen_ai.provider.name"]) == ("text_completion", "gralora")
    assert (by_grpc["gen_ai.request.model"], by_grpc["gen_ai.response.model"]) == ("poet", "poet@2")
    parts = [span for span in collector.spans if span.kind != 2]
    assert {span.parent_span_id for span in parts} == {span.span_id for span in whole.values()}
    assert {"tokenize", "delivery"} <= {span.name for span in parts}
    for span in parts:
        assert any(
            one.start_time_unix_nano
            <= span.start_time_unix_nano
            <= span.end_time_unix_nano
            <= one.end_time_unix_nano + 1
            for one in whole.values()
        )


@pytest.mark.parametrize(
    ("sampling", "traceparent", "num_traced"), [(1.0, "", 3), (0.0, "", 0), (1.0, NOT_TRACED, 0), (0.0, "junk", 0)]
)
async def test_of_others_a_share_is_traced_and_what_a_caller_says_counts(
    sampling: float, traceparent: str, num_traced: int
) -> None:
    metadata = (("traceparent", traceparent),) if traceparent else ()
    with collecting() as collector:
        async with served(engine=engine(), tracing=TracingConfig(endpoint=collector.endpoint, sampling=sampling)) as s:
            for at in range(3):
                await s.client.generation.Generate(ask_once(f"r{at}"), metadata=metadata)

    assert sum(span.kind == 2 for span in collector.spans) == num_traced


async def test_only_a_sampled_trace_is_the_engines_to_name() -> None:
    asker = engine()
    with collecting() as collector:
        async with served(engine=asker, tracing=TracingConfig(endpoint=collector.endpoint, sampling=0.0)) as s:
            for request_id, traceparent in (("traced", TRACED), ("not", NOT_TRACED), ("nobodys", "")):
                metadata = (("traceparent", traceparent),) if traceparent else ()
                await s.client.generation.Generate(ask_once(request_id), metadata=metadata)

    assert {one.request_id: one.trace_id for one in asker.requests} == {"traced": TRACE, "not": "", "nobodys": ""}


async def test_who_asks_again_has_a_span_of_what_it_saw_itself() -> None:
    """The answer was there: its parts are of a time before this call, and would lie outside of its span."""
    with collecting() as collector:
        async with served(engine=engine(), tracing=TracingConfig(endpoint=collector.endpoint)) as s:
            for _ in range(2):
                await s.client.generation.Generate(ask_once("r1"))

    whole = {span.span_id: span for span in collector.spans if span.kind == 2}
    assert len(whole) == 2
    for span in (span for span in collector.spans if span.kind != 2):
        assert whole[span.parent_span_id].start_time_unix_nano <= span.start_time_unix_nano


async def test_the_log_line_says_which_trace_a_request_is_in(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="gralora_server.calls")
    with collecting() as collector:
        async with served(engine=engine(), tracing=TracingConfig(endpoint=collector.endpoint)) as s:
            await s.client.generation.Generate(ask_once("theirs"), metadata=(("traceparent", TRACED),))
            await s.client.generation.Generate(ask_once("ours"))

    told = {line["request_id"]: line["trace_id"] for line in call_lines(caplog)}
    spans = {attributes(span)["gralora.request_id"]: span.trace_id.hex() for span in collector.spans if span.kind == 2}
    assert told == spans
    assert told["theirs"] == TRACE


async def test_a_prompt_is_in_no_span() -> None:
    with collecting() as collector:
        async with served(engine=engine(), tracing=TracingConfig(endpoint=collector.endpoint)) as s:
            await s.client.generation.Generate(ask_once())
    assert collector.spans
    assert "hello" not in str(collector.spans)


async def test_a_collector_that_is_not_there_holds_nobody_up() -> None:
    """Neither a request nor, for longer than a test may take, the server's end."""
    async with served(engine=engine(), tracing=TracingConfig(endpoint="http://127.0.0.1:9")) as s:
        answer = await s.client.generation.Generate(ask_once())
    assert answer.request_id == "r1"


def test_a_server_that_traces_nothing_does_not_even_import_it() -> None:
    program = (
        "import sys, gralora_server.service; sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_what_it_takes_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from gralora_server.tracing.tracing import tracing

    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.grpc.trace_exporter", None)
    monkeypatch.delitem(sys.modules, "gralora_server.tracing.exporter", raising=False)
    with pytest.raises(ConfigError, match="comes with the extra `tracing`"):
        tracing(TracingConfig(endpoint="http://127.0.0.1:4317"))


@pytest.mark.parametrize("settings", [{"endpoint": "127.0.0.1:4317"}, {"endpoint": "http://c", "sampling": 1.5}])
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        TracingConfig(**settings)
