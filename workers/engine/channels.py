"""The worker's end of channels: one message carries a step's events of all requests of one client.

A Ray Serve message takes several hundred microseconds of CPU time, regardless of its size. Each request still has its
own Serve call, which handles load, cancellation and the worker's death; only its events move to the channel, once there
is one.
"""

import asyncio
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

from forecache.workers.core.requests import Accepted, ChannelRequest, EventBatch, Moved, RequestNews, TokenEvent


class _Channel:
    """Buffers events until one client reads them."""

    def __init__(self, channel_id: str) -> None:
        self.channel_id = channel_id
        self.closed = False
        self._events: list[TokenEvent] = []
        self._changed = asyncio.Event()
        self._finished = False

    def put(self, event: TokenEvent) -> None:
        self._events.append(event)
        self._changed.set()

    def finish(self) -> None:
        """No more events follow."""
        self._finished = True
        self._changed.set()

    async def batches(self) -> AsyncGenerator[EventBatch, None]:
        """The buffered events, whenever there are any; those of one iteration of the event loop are one batch."""
        try:
            while self._events or not self._finished:
                await self._changed.wait()
                self._changed.clear()
                events, self._events = self._events, []
                if events:
                    yield EventBatch(tuple(events))
        finally:
            self.closed = True


class Channels:
    """The channels of one worker, at most one for each client. Belongs to one event loop.

    The worker closes a channel after the last request of its client: only the worker knows that no other request is
    about to use it.
    """

    def __init__(self, worker_id: str) -> None:
        self._worker_id = worker_id
        self._channels: dict[str, _Channel] = {}
        self._requests: defaultdict[str, int] = defaultdict(int)

    async def batches(self, request: ChannelRequest) -> AsyncGenerator[EventBatch, None]:
        """Events of the client's requests from now on, until none of them runs.

        Ends at once if none runs, or if the call is for another worker.
        """
        if request.worker_id != self._worker_id or request.client_id not in self._requests:
            return
        channel = self._channels[request.client_id] = _Channel(request.channel_id)
        try:
            async with aclosing(channel.batches()) as batches:
                async for batch in batches:
                    yield batch
        finally:
            if self._channels.get(request.client_id) is channel:
                del self._channels[request.client_id]

    async def carry(self, client_id: str, events: AsyncIterator[TokenEvent]) -> AsyncGenerator[RequestNews, None]:
        """What a request's own call returns: :class:`Accepted`, then its ``events``.

        Once the client has a channel, it returns :class:`Moved` and sends the events there. If that channel closes, it
        ends early, and the client sends the request again. The caller closes ``events``.
        """
        if not client_id:
            async for event in events:
                yield event
            return
        self._requests[client_id] += 1
        channel: _Channel | None = None
        try:
            yield Accepted(self._worker_id)
            async for event in events:
                if channel is None and (channel := self._channels.get(client_id)) is not None:
                    yield Moved(channel.channel_id)
                if channel is None:
                    yield event
                elif channel.closed:
                    return
                else:
                    channel.put(event)
        finally:
            self._leave(client_id)

    def check_idle(self) -> None:
        """Raise ``AssertionError`` if a request or a channel is left."""
        assert not self._requests and not self._channels

    def _leave(self, client_id: str) -> None:
        self._requests[client_id] -= 1
        if not self._requests[client_id]:
            del self._requests[client_id]
            if (channel := self._channels.pop(client_id, None)) is not None:
                channel.finish()
