"""A worker that computes nothing: its engine gives every stream a token in each step, at a steady pace.

Each token's text has the times at which it was made, left the worker and reached the ingress: seconds of
``time.monotonic``, which on Linux is the same for all processes of a machine.
"""

import time
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

from ray import serve

from forecache.cluster.dispatch.channels import RequestCall
from forecache.cluster.dispatch.workers import ServeWorkers
from forecache.cluster.http.ingress import Ingress
from forecache.indexer.serving.telemetry import SILENCE
from forecache.workers.core.config import WorkerSettings
from forecache.workers.core.grammar import Grammars
from forecache.workers.core.requests import GenerateRequest, SequenceStats, TokenEvent
from forecache.workers.core.stats import EngineStats, ScorerStats, WorkerStats
from forecache.workers.engine.async_engine import AsyncEngine
from forecache.workers.engine.channels import Channels
from forecache.workers.engine.worker import DecodeWorker

TOKENS_PER_S = 20.0
APART_SEED = 1
"""An engine setting that means nothing here tells that tokens come apart."""


class StubEngine:
    """What :class:`AsyncEngine` needs of an engine. ``apart``: streams' tokens come one by one, spread over the step,
    else all at once, as from a batch."""

    def __init__(self, *, apart: bool) -> None:
        self.grammars = Grammars(None, frozenset())
        self._apart = apart
        self._requests: dict[str, GenerateRequest] = {}
        self._made: dict[str, int] = {}
        self._due_s: dict[str, float] = {}
        self._cancelled: list[str] = []
        self._next_s = time.monotonic()

    def add_request(self, request: GenerateRequest, arrived_s: float, matcher: object) -> None:
        self._requests[request.request_id], self._made[request.request_id] = request, 0
        beat = 1 / TOKENS_PER_S
        offset = (len(self._requests) * 0.618 % 1) * beat if self._apart else 0.0
        self._due_s[request.request_id] = (time.monotonic() // beat + 1) * beat + offset

    def cancel(self, request_id: str) -> None:
        self._cancelled.append(request_id)

    def wake(self) -> None: ...

    def close(self) -> None: ...

    def check_integrity(self) -> None: ...

    @property
    def idle(self) -> bool:
        return not self._requests

    def wait_for_work(self, timeout_s: float) -> None:
        time.sleep(0.005)

    def step(self) -> list[TokenEvent]:
        """Sleeps until a token is due. All that are due come together."""
        for request_id in (cancelled := self._cancelled):
            self._leave(request_id)
        del cancelled[:]
        if not self._requests:
            return []
        time.sleep(min(max(0.0, min(self._due_s.values()) - time.monotonic()), 0.05))
        now = time.monotonic()
        return [self._token(r, now) for r in list(self._requests) if self._due_s[r] <= now]

    def _token(self, request_id: str, now_s: float) -> TokenEvent:
        request, made = self._requests[request_id], self._made[request_id]
        self._made[request_id] += 1
        self._due_s[request_id] += 1 / TOKENS_PER_S
        last = made + 1 == request.sampling.max_tokens
        stats = SequenceStats(len(request.prompt_token_ids), completion_tokens=made + 1) if last else None
        if last:
            self._leave(request_id)
        return TokenEvent(
            request_id, (5,), f"{now_s:.6f} ", "length" if last else None, stats, position=made,
        )  # fmt: skip

    def _leave(self, request_id: str) -> None:
        for table in (self._requests, self._made, self._due_s):
            table.pop(request_id, None)

    def stats(self) -> EngineStats:
        return EngineStats(running=len(self._requests))


class StubWorker(DecodeWorker):
    """The replica, with no model and no memory."""

    def __init__(self, settings: WorkerSettings) -> None:
        self._channels = Channels(serve.get_replica_context().replica_id.unique_id)
        self._engine = AsyncEngine(StubEngine(apart=settings.engine.seed == APART_SEED))  # type: ignore[arg-type]
        self._telemetry = SILENCE

    async def _events(self, request: GenerateRequest) -> AsyncGenerator[TokenEvent, None]:
        async for event in super()._events(request):
            yield replace(event, text=f"{event.text}{time.monotonic():.6f} ")

    async def stats(self) -> WorkerStats:
        return WorkerStats("stub", "stub", self._engine.stats(), None, ScorerStats("bounds", "", 0))

    async def record_routing_stats(self) -> dict[str, Any]:
        return {}

    def __del__(self) -> None:
        self._engine.close()


class StampingWorkers(ServeWorkers):
    """The way to the workers, with the time at which each event had come."""

    def start(self, request: GenerateRequest) -> RequestCall:
        call = super().start(request)
        return Stamped(call._call, call._channels, request.request_id)


class Stamped(RequestCall):
    async def __anext__(self) -> TokenEvent:
        event = await super().__anext__()
        return replace(event, text=f"{event.text}{time.monotonic():.6f}\n")


class StampingIngress(Ingress):
    workers_class = StampingWorkers
