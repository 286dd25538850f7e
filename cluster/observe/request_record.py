"""What an ingress records of one HTTP request for an answer: its metrics, its span and its log line."""

import logging
import time
from contextlib import ExitStack

from forecache.cluster.observe.metrics import Metrics, RequestTimer
from forecache.indexer.serving.telemetry import Attribute, ProcessTelemetry
from forecache.workers.core.requests import TokenEvent

logger = logging.getLogger(__name__)


class RequestRecord:
    """Starts at the request's admission; :meth:`close` it at the end. ``traceparent`` is the client's span, if any."""

    def __init__(
        self,
        metrics: Metrics,
        telemetry: ProcessTelemetry,
        request_id: str,
        path: str,
        tenant: str,
        prompt_tokens: int,
        traceparent: str,
    ) -> None:
        self._metrics = metrics
        self._timers: dict[int, RequestTimer] = {}
        self._request_id = request_id
        self._tenant = tenant
        self._prompt_tokens = prompt_tokens
        self._completion_tokens = self._cached_tokens = 0
        self._started_s = time.monotonic()
        self._first_token_s: float | None = None
        self._ends: list[str] = []
        self._open = True
        self._stack = ExitStack()
        self._span = self._stack.enter_context(
            telemetry.span(f"POST {path}", traceparent, request_id=request_id, prompt_tokens=prompt_tokens)
        )

    @property
    def traceparent(self) -> str:
        """The span that the workers' spans belong to."""
        return self._span.traceparent

    def opened(self, choice: int) -> None:
        """Start to measure the choice's latencies."""
        self._timers[choice] = self._metrics.request()

    def observe(self, choice: int, event: TokenEvent) -> None:
        """Count an event that the client gets."""
        self._timers[choice].observe(event)
        if event.token_ids and self._first_token_s is None:
            self._first_token_s = time.monotonic() - self._started_s
            self._span.event("first token")
        self._completion_tokens += len(event.token_ids)
        if event.finish_reason is not None:
            self._ends.append(event.finish_reason)
            self._cached_tokens += event.stats.cached_tokens if event.stats is not None else 0

    def resumed(self) -> None:
        """Count a failover to another worker."""
        self._metrics.resumed()

    def close(self) -> None:
        """Write the log line and end the span. Without a finished choice the reason is "cut off". Can be repeated."""
        if not self._open:
            return
        self._open = False
        ends = ",".join(sorted(set(self._ends))) or "cut off"
        outcome: dict[str, Attribute] = {
            "finish_reason": ends,
            "completion_tokens": self._completion_tokens,
            "cached_tokens": self._cached_tokens,
        }
        self._span.set(**outcome)
        self._stack.close()
        logger.info(
            "request ended",
            extra={
                "request_id": self._request_id,
                "tenant": self._tenant,
                "prompt_tokens": self._prompt_tokens,
                **outcome,
                "first_token_s": None if self._first_token_s is None else round(self._first_token_s, 4),
                "duration_s": round(time.monotonic() - self._started_s, 4),
            },
        )
