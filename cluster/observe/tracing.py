"""OpenTelemetry traces of requests. Imports OpenTelemetry only if there is an endpoint."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

from forecache.cluster.errors import StartError
from forecache.indexer.serving.telemetry import Attribute, SilentSpan, Span

if TYPE_CHECKING:
    from opentelemetry.trace import Span as OtelSpan

EXPORT_PERIOD_MS = 1000


class Tracer(Protocol):
    def span(self, name: str, traceparent: str, **attributes: Attribute) -> AbstractContextManager[Span]: ...


class NoTracer:
    def span(self, name: str, traceparent: str, **attributes: Attribute) -> AbstractContextManager[Span]:
        return nullcontext(SilentSpan())


def make_tracer(endpoint: str | None, component: str, process: str) -> Tracer:
    """The tracer of a process. Raises :class:`.errors.StartError` if OpenTelemetry is not installed."""
    return NoTracer() if endpoint is None else OtlpTracer(endpoint, component, process)


def check_installed(endpoint: str | None) -> None:
    """Raise :class:`.errors.StartError` if there is an endpoint, but OpenTelemetry is not installed."""
    if endpoint is None:
        return
    try:
        import opentelemetry.exporter.otlp.proto.http.trace_exporter
        import opentelemetry.sdk.trace  # noqa: F401
    except ImportError as error:
        raise StartError(f"--otlp-endpoint needs OpenTelemetry: pip install 'forecache[otlp]' ({error})") from error


class OtlpTracer:
    """Sends this process' spans to ``endpoint`` over HTTP once a second, in a thread of the SDK."""

    def __init__(self, endpoint: str, component: str, process: str) -> None:
        check_installed(endpoint)
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        resource = Resource.create({"service.name": f"forecache-{component}", "service.instance.id": process})
        self._provider = TracerProvider(resource=resource)
        exporter = OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces")
        self._provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=EXPORT_PERIOD_MS))
        self._tracer = self._provider.get_tracer("forecache")

    @contextmanager
    def span(self, name: str, traceparent: str, **attributes: Attribute) -> Iterator[Span]:
        from opentelemetry.propagate import extract
        from opentelemetry.trace import Status, StatusCode

        above = extract({"traceparent": traceparent} if traceparent else {})
        made = self._tracer.start_span(name, above, attributes=dict(attributes))
        try:
            yield OtlpSpan(made)
        except Exception as error:
            made.record_exception(error)
            made.set_status(Status(StatusCode.ERROR, str(error)))
            raise
        finally:
            made.end()


class OtlpSpan:
    """A running span."""

    def __init__(self, span: "OtelSpan") -> None:
        self._span = span

    @property
    def traceparent(self) -> str:
        from opentelemetry.propagate import inject
        from opentelemetry.trace import set_span_in_context

        carrier: dict[str, Any] = {}
        inject(carrier, set_span_in_context(self._span))
        return str(carrier.get("traceparent", ""))

    def set(self, **attributes: Attribute) -> None:
        self._span.set_attributes(dict(attributes))

    def event(self, name: str, **attributes: Attribute) -> None:
        self._span.add_event(name, dict(attributes))
