"""The telemetry of a process: its logs, its `/metrics` port, its spans."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import ray
from prometheus_client import CollectorRegistry, start_http_server

from forecache.cluster.config import TelemetryConfig
from forecache.cluster.errors import StartError
from forecache.cluster.observe import logs
from forecache.cluster.observe.metrics import registry_of
from forecache.cluster.observe.tracing import Tracer, make_tracer
from forecache.indexer.serving.telemetry import Attribute, Component, MetricsTarget, Span

logger = logging.getLogger(__name__)

ANY_HOST = ("0.0.0.0", "::")


@dataclass(frozen=True)
class RunningTelemetry:
    """The telemetry of a process, which runs until the process ends."""

    target: MetricsTarget
    tracer: Tracer

    def span(self, name: str, traceparent: str, **attributes: Attribute) -> AbstractContextManager[Span]:
        return self.tracer.span(name, traceparent, **attributes)


@dataclass(frozen=True)
class ClusterTelemetry:
    """Implements :class:`forecache.indexer.serving.telemetry.Telemetry`.

    ``host``: address to listen on; ``None``: the node's address. Targets name the node's address if ``host`` is
    0.0.0.0.
    """

    config: TelemetryConfig
    model_name: str
    host: str | None

    def start(self, component: Component, process: str, node: str, stats: Callable[[], object]) -> RunningTelemetry:
        """Start the telemetry of a process. Raises :class:`.errors.StartError` when no port is free."""
        return self.start_with(registry_of(self.model_name, stats), component, process, node)

    def start_with(
        self, registry: CollectorRegistry, component: Component, process: str, node: str
    ) -> RunningTelemetry:
        """Like :meth:`start`, with an existing registry."""
        logs.configure(self.config, component, process)
        node_ip = str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
        host = self.host or node_ip
        address = node_ip if host in ANY_HOST else host
        address = f"[{address}]" if ":" in address else address
        target = MetricsTarget(f"{address}:{self._serve(registry, host)}", component, process, node)
        logger.info("%s serves its metrics at %s", component, target.address)
        return RunningTelemetry(target, make_tracer(self.config.otlp_endpoint, component, process))

    def _serve(self, registry: CollectorRegistry, host: str) -> int:
        """Serve ``registry`` in a daemon thread; returns the port."""
        first, count = self.config.metrics_first_port, self.config.metrics_ports
        for port in range(first, first + count) if first else (0,):
            try:
                server, _ = start_http_server(port, host, registry)
            except OSError as error:
                reason = error
                continue
            return int(server.server_port)
        raise StartError(
            f"no port for /metrics on {host} from {first or 'any'}: {reason}; change --metrics-host or "
            f"--metrics-first-port"
        )
