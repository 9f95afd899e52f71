"""OpenTelemetry: one span a request, where $OTEL_EXPORTER_OTLP_ENDPOINT says where to; within the caller's trace where the request has a
`traceparent`. No text is in it."""

import os
from collections.abc import Callable, Mapping
from typing import Any

from embedft.errors import UsageError

ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
Trace = Callable[[str, int, int, Mapping[str, Any], str], None]


def tracing() -> Trace | None:
    """What the access log calls with (route, start, end in ns, attributes, traceparent or ''), or None where nothing is configured.
    UsageError where the SDK is not installed."""
    if not os.environ.get(ENDPOINT):
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise UsageError(f"${ENDPOINT} is set, but OpenTelemetry is not installed: pip install 'embedft[traces]', or unset it") from None
    return spans_to(BatchSpanProcessor(OTLPSpanExporter()))


def spans_to(processor: Any) -> Trace:
    """Spans through `processor` of the SDK."""
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import SpanKind, StatusCode
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    provider = TracerProvider(resource=Resource.create({"service.name": os.environ.get("OTEL_SERVICE_NAME", "embedft")}))
    provider.add_span_processor(processor)
    tracer, propagator = provider.get_tracer("embedft"), TraceContextTextMapPropagator()

    def trace(route: str, start: int, end: int, attributes: Mapping[str, Any], parent: str) -> None:
        caller = propagator.extract({"traceparent": parent}) if parent else None
        span = tracer.start_span(route, context=caller, start_time=start, kind=SpanKind.SERVER)
        for name, value in attributes.items():
            span.set_attribute(f"embedft.{name}", value if isinstance(value, str | int | float | bool) else str(value))
        if int(attributes.get("status", 200)) >= 500:
            span.set_status(StatusCode.ERROR)
        span.end(end_time=end)

    return trace
