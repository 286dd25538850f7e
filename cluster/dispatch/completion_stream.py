"""One request's events, watched, and the HTTP response that ends them."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Protocol

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from forecache.cluster.errors import AnswerFailedError, WorkerLostError
from forecache.workers.core.requests import TokenEvent
from forecache.workers.errors import (
    ChunkLostError,
    InvalidRequestError,
    NonFiniteError,
    OverloadedError,
)


class TokenStream(Protocol):
    """Events of one request, from a worker. ``cancel`` may be called at any time and never waits."""

    def __aiter__(self) -> AsyncIterator[TokenEvent]: ...

    async def __anext__(self) -> TokenEvent: ...

    def cancel(self) -> None: ...


class EventStream:
    """A :class:`TokenStream` whose silence is seen, whose start can be awaited, and which ends with a last event.

    ``close`` is synchronous, since the task that runs it may be one that is being cancelled and can't await.
    """

    def __init__(
        self, source: TokenStream, *, silence_s: float, observe: Callable[[TokenEvent], None] | None = None
    ) -> None:
        self._source = source
        self._silence_s = silence_s
        self._observe = observe
        self._next: asyncio.Task[TokenEvent] | None = None
        self._finished = False

    async def start(self, wait_s: float) -> bool:
        """Wait for the first event, ``wait_s`` at most: a request that is refused then fails before any answer.
        Returns whether it came."""
        self._next = asyncio.ensure_future(self._pull())
        await asyncio.wait({self._next}, timeout=wait_s)
        if not self._next.done():
            return False
        self._next.result()
        return True

    async def events(self) -> AsyncIterator[TokenEvent | None]:
        """Events to the last; ``None`` after each ``silence_s`` without one. Raises what went wrong, typed."""
        while self._next is not None or not self._finished:
            if self._next is None:
                self._next = asyncio.ensure_future(self._pull())
            await asyncio.wait({self._next}, timeout=self._silence_s)
            if not self._next.done():
                yield None
                continue
            pulled, self._next = self._next, None
            yield pulled.result()

    def close(self) -> None:
        """Stop the request on its worker unless it is over."""
        if self._next is not None:
            self._next.add_done_callback(_forget)
            self._next.cancel()
            self._next = None
        if not self._finished:
            self._finished = True
            self._source.cancel()

    async def _pull(self) -> TokenEvent:
        """The next event. Raises what went wrong, whether it came as an exception or as an event."""
        try:
            event = await anext(self._source)
        except StopAsyncIteration:
            raise WorkerLostError("the worker ended the answer early; send the request again") from None
        self._finished = event.finish_reason is not None
        if self._observe is not None:
            self._observe(event)
        if event.too_large:
            raise InvalidRequestError(event.error or "the request is larger than all memory", param="messages")
        if event.overloaded:
            raise OverloadedError(event.error or "no room")
        if event.chunks_lost:
            raise ChunkLostError(event.error or "stored chunks of the request were lost")
        if event.non_finite:
            raise NonFiniteError(event.error or "the model computed infinity or no number")
        if event.finish_reason == "error":
            raise AnswerFailedError(event.error or "the worker failed without saying why")
        if event.finish_reason == "cancelled":
            raise WorkerLostError("the worker gave the request up: it is being stopped")
        return event


def _forget(task: "asyncio.Task[TokenEvent]") -> None:
    """What a request that was given up says in the end is of no use to anybody, and no news for the log."""
    if not task.cancelled():
        task.exception()


class Closable(Protocol):
    def close(self) -> None: ...


class EventStreamResponse(StreamingResponse):
    """Server-sent events that stop their request whenever the response ends, even before its first byte."""

    def __init__(self, stream: Closable, body: AsyncIterator[str]) -> None:
        super().__init__(
            body,
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._stream.close()
