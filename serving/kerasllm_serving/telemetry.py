"""Traces of requests, in OpenTelemetry's format; needs the extra `telemetry`."""

import os
import sys
from collections.abc import Mapping
from typing import Any

import grpc

from kerasllm_serving.errors import StartupError

# They come every second, and say nothing.
_UNTRACED = "^https?://[^/]*/(health|ready|metrics)$"


class Telemetry:
    """Makes a span of each request and sends it to a collector, over HTTP.

    OpenTelemetry's own environment variables say where to and how much: `OTEL_EXPORTER_OTLP_ENDPOINT`
    (default http://localhost:4318), `OTEL_EXPORTER_OTLP_HEADERS`, `OTEL_SERVICE_NAME` (default
    kerasllm_serving), `OTEL_RESOURCE_ATTRIBUTES`, `OTEL_TRACES_SAMPLER` and the others. A client's
    `traceparent` is gone on with. No text of a request or of an answer is sent.

    Raises:
        StartupError: If OpenTelemetry is not installed.
    """

    def __init__(self) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.instrumentation import asgi
            from opentelemetry.instrumentation import grpc as grpc_instrumentation
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ModuleNotFoundError as error:
            raise StartupError(
                "`--enable_opentelemetry` needs pip install 'kerasllm[telemetry]'. "
                f"Received: no module {error.name!r}"
            ) from error
        os.environ.setdefault("OTEL_SERVICE_NAME", "kerasllm_serving")
        self._asgi, self._grpc = asgi, grpc_instrumentation
        self._provider = TracerProvider()
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))

    def traced(self, app: Any) -> Any:
        """Returns an ASGI application that makes spans of the requests of another."""
        return self._asgi.OpenTelemetryMiddleware(
            app,
            excluded_urls=_UNTRACED,
            tracer_provider=self._provider,
            exclude_spans=["receive", "send"],  # one for each piece of a stream
        )

    def interceptor(self) -> grpc.ServerInterceptor:
        """Returns what makes spans of gRPC's requests."""
        return self._grpc.server_interceptor(tracer_provider=self._provider)

    def close(self) -> None:
        """Sends what has not been sent."""
        self._provider.shutdown()


def annotate(attributes: Mapping[str, Any]) -> None:
    """Says more of the request that is being answered, where spans are made.

    Args:
        attributes: By names of OpenTelemetry's conventions for generative models.
    """
    trace = sys.modules.get("opentelemetry.trace")
    if trace:
        trace.get_current_span().set_attributes(attributes)
