"""Interface of a process's `/metrics`, logs and traces.

`cluster/observe/telemetry.py` implements it. Workers, tiers and indexers may not import that file, so they
receive its objects by pickle.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal, Protocol

Component = Literal["ingress", "worker", "tier", "indexer"]
Attribute = str | int | float | bool


@dataclass(frozen=True)
class MetricsTarget:
    """Where a process serves its `/metrics`. ``address``: host:port; ``process``: the process's id in logs."""

    address: str
    component: Component
    process: str
    node: str


class Span(Protocol):
    """A span of a trace. ``traceparent`` (W3C) is the parent for child spans; empty if tracing is off."""

    @property
    def traceparent(self) -> str: ...

    def set(self, **attributes: Attribute) -> None: ...

    def event(self, name: str, **attributes: Attribute) -> None: ...


class ProcessTelemetry(Protocol):
    """The running telemetry of one process."""

    @property
    def target(self) -> MetricsTarget | None:
        """Where this process serves `/metrics`; ``None`` if it does not."""
        ...

    def span(self, name: str, traceparent: str, **attributes: Attribute) -> AbstractContextManager[Span]:
        """A span that lasts for the ``with`` block, a child of ``traceparent``. Records an exception of the block."""
        ...


class Telemetry(Protocol):
    """Picklable settings of telemetry. Each process that receives them calls :meth:`start` once."""

    def start(self, component: Component, process: str, node: str, stats: Callable[[], object]) -> ProcessTelemetry:
        """Serve `/metrics` from ``stats``, which returns this process's frozen statistics and runs in any thread."""
        ...


@dataclass(frozen=True)
class SilentSpan:
    traceparent: str = ""

    def set(self, **attributes: Attribute) -> None:
        pass

    def event(self, name: str, **attributes: Attribute) -> None:
        pass


@dataclass(frozen=True)
class Silence:
    """Telemetry that does nothing: no metrics, no change of logging, no traces."""

    target: MetricsTarget | None = None

    def start(self, component: Component, process: str, node: str, stats: Callable[[], object]) -> "Silence":
        return self

    def span(self, name: str, traceparent: str, **attributes: Attribute) -> AbstractContextManager[Span]:
        return nullcontext(SilentSpan())


SILENCE = Silence()
