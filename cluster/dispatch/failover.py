"""When a request that lost its worker continues on another one, and with which request (docs/architecture.md)."""

from dataclasses import replace
from random import uniform

from forecache.cluster.config import ResumeConfig
from forecache.cluster.errors import WorkerLostError, WorkerSilentError
from forecache.workers.core.requests import GenerateRequest, TokenEvent

FIRST_BACKOFF_S, MAX_BACKOFF_S = 0.1, 5.0


def try_id(request_id: str, epoch: int) -> str:
    """The id of a request after ``epoch`` failovers."""
    return f"{request_id}~{epoch}"


def first_try_id(request_id: str) -> str:
    """The original id of a request that :func:`try_id` renamed."""
    return request_id.partition("~")[0]


class Failover:
    """The tokens that one request has received so far, and how often it changed workers.

    Failovers are limited in three ways: losses in a row without a new token (``resume_attempts``), workers that hung
    (``max_silent_workers``), since each costs a worker and the request may be the cause, and failovers in total
    (``max_resumes``), since one token between two losses is little progress.
    """

    def __init__(self, request: GenerateRequest, config: ResumeConfig) -> None:
        self.request = request
        self.tokens: list[int] = []
        self.epoch = 0
        self._config = config
        self._losses_in_a_row = self._silences = 0

    def accept(self, event: TokenEvent) -> TokenEvent:
        """Count ``event``'s tokens. Returns it under the request's original id.

        Raises :class:`WorkerLostError` if the worker can't be trusted with the rest of the answer.
        """
        if event.finish_reason == "cancelled":
            raise WorkerLostError("the worker gave the request up: it is being stopped")
        if event.overloaded and self.tokens:  # another worker may have room; before the first token it is a refusal
            raise WorkerLostError(event.error or "no room")
        if event.token_ids:
            if event.position != len(self.tokens):
                raise WorkerLostError(f"token {event.position} came after {len(self.tokens)} tokens")
            self._losses_in_a_row = 0
            self.tokens += event.token_ids
        request_id = self.request.request_id
        return event if event.request_id == request_id else replace(event, request_id=request_id)

    def pause_s(self, error: WorkerLostError) -> float:
        """Seconds to wait before the next worker gets the request, after ``error`` lost the last one.

        Raises :class:`WorkerLostError` when a limit is reached.
        """
        self._losses_in_a_row += 1
        self._silences += isinstance(error, WorkerSilentError)
        if limit := self._limit_reached():
            raise WorkerLostError(f"{error}. It was not tried again: {limit}") from error
        longest_s: float = min(MAX_BACKOFF_S, FIRST_BACKOFF_S * 2 ** (self._losses_in_a_row - 1))
        return longest_s * uniform(0.5, 1)  # so that requests of one lost worker don't all return at once

    def next_request(self) -> GenerateRequest:
        """The request for the next worker: it continues after the tokens received so far."""
        self.epoch += 1
        return replace(
            self.request,
            request_id=try_id(self.request.request_id, self.epoch),
            resume_token_ids=(*self.request.resume_token_ids, *self.tokens),
        )

    def _limit_reached(self) -> str:
        """Why no other worker gets the request; empty if one does."""
        config = self._config
        if self._losses_in_a_row > config.resume_attempts:
            return f"{self._losses_in_a_row} workers in a row were lost without one more token (--resume-attempts)"
        if self._silences >= config.max_silent_workers:
            return f"{self._silences} workers hung or fell silent on it (--max-silent-workers)"
        if self.epoch >= config.max_resumes:
            return f"it has gone on at another worker {self.epoch} times (--max-resumes)"
        return ""
