"""The log line and the trace span of one HTTP request."""

import logging
import time
from contextlib import ExitStack

from forecache.indexer.serving.telemetry import Attribute, ProcessTelemetry
from forecache.workers.core.requests import TokenEvent

logger = logging.getLogger(__name__)


class RequestRecord:
    """Records a request from its admission until ``close``. ``traceparent``: the client's, or empty."""

    def __init__(
        self, telemetry: ProcessTelemetry, request_id: str, path: str, tenant: str, prompt_tokens: int, traceparent: str
    ) -> None:
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
        """Context of this span, the parent of the workers' spans."""
        return self._span.traceparent

    def observe(self, event: TokenEvent) -> None:
        """Record an event of any of the request's choices."""
        if event.token_ids and self._first_token_s is None:
            self._first_token_s = time.monotonic() - self._started_s
            self._span.event("first token")
        self._completion_tokens += len(event.token_ids)
        if event.finish_reason is not None:
            self._ends.append(event.finish_reason)
            self._cached_tokens += event.stats.cached_tokens if event.stats is not None else 0

    def close(self) -> None:
        """The response has ended; a request without a finish reason was cut off. Idempotent."""
        if not self._open:
            return
        self._open = False
        ends = ",".join(sorted(set(self._ends))) or "cut off"
        told: dict[str, Attribute] = {
            "finish_reason": ends,
            "completion_tokens": self._completion_tokens,
            "cached_tokens": self._cached_tokens,
        }
        self._span.set(**told)
        self._stack.close()
        logger.info(
            "request ended",
            extra={
                "request_id": self._request_id,
                "tenant": self._tenant,
                "prompt_tokens": self._prompt_tokens,
                **told,
                "first_token_s": None if self._first_token_s is None else round(self._first_token_s, 4),
                "duration_s": round(time.monotonic() - self._started_s, 4),
            },
        )
