"""A stream of tokens that outlives its worker (docs/architecture.md)."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from random import uniform
from typing import TYPE_CHECKING

from forecache.cluster.config import ResumeConfig
from forecache.cluster.errors import NoWorkerError, WorkerLostError, WorkerSilentError
from forecache.workers.core.requests import GenerateRequest, TokenEvent

if TYPE_CHECKING:  # what settings import must not bring the web framework
    from forecache.cluster.dispatch.completion_stream import TokenStream

logger = logging.getLogger(__name__)

FIRST_BACKOFF_S, MAX_BACKOFF_S = 0.1, 5.0


def try_id(request_id: str, epoch: int) -> str:
    """The id under which a request goes on at its ``epoch``-th other worker."""
    return f"{request_id}~{epoch}"


def first_try_id(request_id: str) -> str:
    """The id that the request of :func:`try_id` has in all its tries."""
    return request_id.partition("~")[0]


class ResumingStream:
    """A :class:`.streams.TokenStream` over one worker after another; ``start`` sends a request to some worker, and
    ``on_resume`` is called each time that another one is asked.

    A worker is lost when Ray says so, when its engine has ended or hangs, when it gives the request up, or when it is
    silent for too long, whether or not the answer has begun: as long as a worker gets on, be it with one long step, it
    says so from time to time (``TokenEvent.waiting``, which ends here). Then prompt and tokens so far go elsewhere,
    under a request id of the next epoch; the old worker is cancelled and heard no more. So it is when the next worker
    has no room: others may.

    The tries are bounded in three ways: in a row without one more token; in which a worker hung, since each costs a
    worker and the request may be what does it; and in all, since a token between two of them proves little.
    """

    def __init__(
        self,
        request: GenerateRequest,
        start: "Callable[[GenerateRequest], TokenStream]",
        config: ResumeConfig,
        on_resume: Callable[[], None],
    ) -> None:
        self._request = request
        self._start = start
        self._config = config
        self._on_resume = on_resume
        self._epoch = 0
        self._failures = self._silences = 0
        self._sent: list[int] = []
        self._cancelled = False
        self._source = start(request)

    def __aiter__(self) -> AsyncIterator[TokenEvent]:
        return self

    async def __anext__(self) -> TokenEvent:
        """The next event. Raises :class:`WorkerLostError` when no worker goes on with the answer."""
        while True:
            try:
                event = await self._pull()
            except WorkerLostError as error:
                if isinstance(error, NoWorkerError):
                    self._source.cancel()
                    raise  # another try would wait for the same
                if self._cancelled:
                    raise  # a cancelled call looks lost too, but nobody wants its answer any more
                await self._resume(error)
                continue
            if event.waiting:
                continue
            if event.token_ids:
                self._failures = 0
                self._sent += event.token_ids
            return replace(event, request_id=self._request.request_id)

    def cancel(self) -> None:
        self._cancelled = True
        self._source.cancel()

    async def _pull(self) -> TokenEvent:
        deadline_s = self._config.token_deadline_s
        try:
            async with asyncio.timeout(deadline_s):
                event = await anext(self._source)
        except TimeoutError as error:
            raise WorkerSilentError(f"the worker said nothing for {deadline_s:g} s") from error
        except StopAsyncIteration:
            raise WorkerLostError("the worker ended the answer early") from None
        if event.finish_reason == "cancelled":
            raise WorkerLostError("the worker gave the request up: it is being stopped")
        if event.overloaded and self._sent:
            raise WorkerLostError(event.error or "no room")
        if event.token_ids and event.position != len(self._sent):
            raise WorkerLostError(f"token {event.position} came after {len(self._sent)} tokens")
        return event

    async def _resume(self, error: WorkerLostError) -> None:
        self._source.cancel()
        self._failures += 1
        self._silences += isinstance(error, WorkerSilentError)
        if why := self._out_of_tries():
            raise WorkerLostError(f"{error}. It was tried no more: {why}") from error
        request_id = self._request.request_id
        logger.warning("%s goes on at another worker after %d tokens: %s", request_id, len(self._sent), error)
        await asyncio.sleep(min(MAX_BACKOFF_S, FIRST_BACKOFF_S * 2 ** (self._failures - 1)) * uniform(0.5, 1))
        if self._cancelled:
            raise error
        self._epoch += 1
        self._on_resume()
        self._source = self._start(
            replace(
                self._request,
                request_id=try_id(request_id, self._epoch),
                resume_token_ids=(*self._request.resume_token_ids, *self._sent),
            )
        )

    def _out_of_tries(self) -> str:
        """Why no other worker is asked; empty: one is."""
        config = self._config
        if self._failures > config.resume_attempts:
            return f"{self._failures} workers in a row were lost without one more token (--resume-attempts)"
        if self._silences >= config.max_silent_workers:
            return f"{self._silences} workers hung or fell silent on it (--max-silent-workers)"
        if self._epoch >= config.max_resumes:
            return f"it has gone on at another worker {self._epoch} times (--max-resumes)"
        return ""
