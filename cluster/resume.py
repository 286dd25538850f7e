"""A stream of tokens that outlives its worker (design §5.9)."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from random import uniform
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

from forecache.cluster.errors import WorkerLostError
from forecache.workers.decode.messages import GenerateRequest, TokenEvent

if TYPE_CHECKING:  # what settings import must not bring the web framework
    from forecache.cluster.streams import TokenStream

logger = logging.getLogger(__name__)

FIRST_BACKOFF_S, MAX_BACKOFF_S = 0.1, 5.0


class ResumeConfig(BaseModel):
    """When a running answer is taken to another worker."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    token_deadline_s: float = Field(
        120.0, gt=0, description="longest silence within an answer before another worker goes on with it"
    )
    resume_attempts: int = Field(
        8, ge=0, description="workers that are tried in a row without one more token; then the request fails"
    )


class ResumingStream:
    """A :class:`.streams.TokenStream` over one worker after another; ``start`` sends a request to some worker, and
    ``on_resume`` is called each time that another one is asked.

    A worker is lost when Ray says so, when its engine has ended, when it gives the request up, or when it is silent
    for too long once the answer has begun (as long as it says nothing at all, the request may be waiting for its turn).
    Then prompt and tokens so far go elsewhere, under a request id of the next epoch; the old worker is cancelled and
    heard no more. So it is when the next worker has no room: others may.
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
        self._failures = 0
        self._sent: list[int] = []
        self._cancelled = False
        self._source = start(request)
        self._heard = False
        """Whether the source has said anything."""

    def __aiter__(self) -> AsyncIterator[TokenEvent]:
        return self

    async def __anext__(self) -> TokenEvent:
        """The next event. Raises :class:`WorkerLostError` when no worker goes on with the answer."""
        while True:
            try:
                event = await self._pull()
            except WorkerLostError as error:
                if self._cancelled:
                    raise  # a cancelled call looks lost too, but nobody wants its answer any more
                await self._resume(error)
                continue
            if event.token_ids:
                self._failures = 0
                self._sent += event.token_ids
            return replace(event, request_id=self._request.request_id)

    def cancel(self) -> None:
        self._cancelled = True
        self._source.cancel()

    async def _pull(self) -> TokenEvent:
        deadline_s = self._config.token_deadline_s if self._sent and self._heard else None
        try:
            async with asyncio.timeout(deadline_s):
                event = await anext(self._source)
        except TimeoutError as error:
            raise WorkerLostError(f"no token came for {deadline_s:g} s") from error
        except StopAsyncIteration:
            raise WorkerLostError("the worker ended the answer early") from None
        self._heard = True
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
        if self._failures > self._config.resume_attempts:
            raise error
        request_id = self._request.request_id
        logger.warning("%s goes on at another worker after %d tokens: %s", request_id, len(self._sent), error)
        await asyncio.sleep(min(MAX_BACKOFF_S, FIRST_BACKOFF_S * 2 ** (self._failures - 1)) * uniform(0.5, 1))
        if self._cancelled:
            raise error
        self._epoch += 1
        self._heard = False
        self._on_resume()
        self._source = self._start(
            replace(
                self._request,
                request_id=f"{request_id}~{self._epoch}",
                resume_token_ids=(*self._request.resume_token_ids, *self._sent),
            )
        )
