"""Spans on their way to a collector, by OTLP over gRPC. The only place that knows OpenTelemetry."""

from __future__ import annotations

import time

from gralora_runtime.errors import ConfigError
from gralora_runtime.observation.waterfall import Waterfall
from gralora_runtime.request import GenerationRequest
from gralora_server.config import TracingConfig
from gralora_server.tracing import spans
from gralora_server.tracing.parent import HEADER, parent
from gralora_server.tracing.tracing import Trace

try:
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import SERVICE_NAME, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
    from opentelemetry.trace import (
        Span,
        SpanKind,
        Status,
        StatusCode,
        Tracer,
        format_trace_id,
        set_span_in_context,
    )
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
except ImportError as cause:
    raise ConfigError(
        f"otlp_endpoint: {cause.name} is not installed: it comes with the extra `tracing` of gralora-server"
    ) from cause

EXPORT_S = 5  # for a collector to take a batch; then it is lost


class Exported:
    """Traces what its caller traces and, of the others, a share."""

    def __init__(self, config: TracingConfig) -> None:
        exporter = OTLPSpanExporter(
            endpoint=config.endpoint, insecure=config.endpoint.startswith("http://"), timeout=EXPORT_S
        )
        self._provider = TracerProvider(
            sampler=ParentBasedTraceIdRatio(config.sampling),
            resource=Resource.create({SERVICE_NAME: spans.SYSTEM}),
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("gralora_server")
        self._propagator = TraceContextTextMapPropagator()

    def begin(self) -> Trace:
        """See `Tracing`."""
        context = self._propagator.extract({HEADER: parent()})
        return _Trace(self._tracer, self._tracer.start_span(spans.SYSTEM, context, kind=SpanKind.SERVER))

    def close(self) -> None:
        """See `Tracing`."""
        self._provider.shutdown()


class _Trace:
    """A span of the whole, and in it one for each part."""

    def __init__(self, tracer: Tracer, root: Span) -> None:
        self._tracer = tracer
        self._root = root
        self._began_ns = time.time_ns()
        self.is_sampled = root.is_recording()
        is_in_one = self.is_sampled or parent()  # the sampler makes an id for those that it passes over, too
        self.trace_id = str(format_trace_id(root.get_span_context().trace_id)) if is_in_one else ""

    def end(self, asked: GenerationRequest, found: Waterfall, *, request_id: str, base_model: str) -> None:
        """See `Trace`."""
        root = self._root
        root.update_name(f"{spans.operation_of(asked)} {'+'.join(asked.named_adapters) or base_model}")
        root.set_attributes(spans.of_request(asked, found, request_id, base_model))
        if found.outcome not in spans.WHOLE:
            root.set_status(Status(StatusCode.ERROR, found.outcome))
        inside = set_span_in_context(root)
        received_ns = _ns(found.received_at)  # whole numbers are added to it: today's seconds have steps of 0.2 us
        for part in found.parts:
            began_ns = received_ns + _ns(part.start_s)
            ended_ns = received_ns + _ns(part.start_s + part.duration_s)
            if ended_ns < self._began_ns:
                continue  # of a request that ran before this call asked for the same
            span = self._tracer.start_span(spans.name_of(part), inside, start_time=max(began_ns, self._began_ns))
            span.set_attributes(spans.of_part(part))
            span.end(ended_ns)
        root.end(max(self._began_ns, received_ns + _ns(found.total_s)))


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
