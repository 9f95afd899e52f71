"""OpenTelemetry: one span a request, where $OTEL_EXPORTER_OTLP_ENDPOINT says where to and the SDK is installed. No text is in it."""

import os
from collections.abc import Callable, Mapping
from typing import Any

ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
Trace = Callable[[str, int, int, Mapping[str, Any]], None]


def tracing() -> Trace | None:
    """What the access log calls with (route, start, end in ns, attributes), or None where nothing is configured."""
    if not os.environ.get(ENDPOINT):
        return None
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    return spans_to(BatchSpanProcessor(OTLPSpanExporter()))


def spans_to(processor: Any) -> Trace:
    """Spans through `processor` of the SDK."""
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import SpanKind, StatusCode

    provider = TracerProvider(resource=Resource.create({"service.name": os.environ.get("OTEL_SERVICE_NAME", "embedft")}))
    provider.add_span_processor(processor)
    tracer = provider.get_tracer("embedft")

    def trace(route: str, start: int, end: int, attributes: Mapping[str, Any]) -> None:
        span = tracer.start_span(route, start_time=start, kind=SpanKind.SERVER)
        for name, value in attributes.items():
            span.set_attribute(f"embedft.{name}", value if isinstance(value, str | int | float | bool) else str(value))
        if int(attributes.get("status", 200)) >= 500:
            span.set_status(StatusCode.ERROR)
        span.end(end_time=end)

    return trace
