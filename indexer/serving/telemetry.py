"""Interface of a process's `/metrics`, logs and traces.

`cluster/observe/telemetry.py` implements it. Workers, tiers and indexers may not import that file: they get it pickled.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal, Protocol

Component = Literal["ingress", "worker", "tier", "indexer"]
Attribute = str | int | float | bool


@dataclass(frozen=True)
class MetricsTarget:
    """Where a process serves its `/metrics`: ``address`` is host:port, ``process`` the id it has in logs."""

    address: str
    component: Component
    process: str
    node: str


class Span(Protocol):
    """A piece of a request's way. ``traceparent`` (W3C) makes others its children; empty where nothing is traced."""

    @property
    def traceparent(self) -> str: ...

    def set(self, **attributes: Attribute) -> None: ...

    def event(self, name: str, **attributes: Attribute) -> None: ...


class ProcessTelemetry(Protocol):
    """That of one process, under way."""

    @property
    def target(self) -> MetricsTarget | None:
        """``None``: nothing is served."""
        ...

    def span(self, name: str, traceparent: str, **attributes: Attribute) -> AbstractContextManager[Span]:
        """From now to the end of the block, below ``traceparent``; an exception that leaves the block is told."""
        ...


class Telemetry(Protocol):
    """Settings that travel; every process that gets them starts them once."""

    def start(self, component: Component, process: str, node: str, stats: Callable[[], object]) -> ProcessTelemetry:
        """Serve what ``stats`` returns, frozen stats of this kind of process, as `/metrics`; any thread calls it."""
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
    """Telemetry of nobody: nothing is served, logged otherwise or traced."""

    target: MetricsTarget | None = None

    def start(self, component: Component, process: str, node: str, stats: Callable[[], object]) -> "Silence":
        return self

    def span(self, name: str, traceparent: str, **attributes: Attribute) -> AbstractContextManager[Span]:
        return nullcontext(SilentSpan())


SILENCE = Silence()
