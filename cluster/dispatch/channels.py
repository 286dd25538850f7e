"""The client's end of channels: events of all requests at one worker come as one message, and go to whom they are for.

See :mod:`forecache.workers.engine.channels` for the worker's end.
"""

import asyncio
import logging
import uuid
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextvars import Context
from typing import Protocol

from forecache.cluster.errors import NoWorkerError, WorkerLostError
from forecache.workers.core.requests import (
    SIGN_OF_LIFE_S,
    Accepted,
    ChannelRequest,
    EventBatch,
    Moved,
    RequestNews,
    TokenEvent,
)

logger = logging.getLogger(__name__)

WORTH_A_CHANNEL = 2
"""Requests at one worker from which on it pays: one alone has nothing to go together with."""


class Call(Protocol):
    """A streaming call of a worker: raises :class:`WorkerLostError`, or what the worker raised. ``cancel`` may be said
    at any time and never waits."""

    @property
    def assigned(self) -> bool:
        """Whether a worker has it. Before that it waits for one with a place for it, or for one to start."""
        ...

    def __aiter__(self) -> AsyncIterator[RequestNews | EventBatch]: ...

    async def __anext__(self) -> RequestNews | EventBatch: ...

    def cancel(self) -> None: ...


class _Mailbox:
    """What has come for one request by its worker's channel, until the request's reader takes it."""

    def __init__(self) -> None:
        self._events: deque[TokenEvent] = deque()
        self._error: BaseException | None = None
        self._reader: asyncio.Future[None] | None = None

    def put(self, event: TokenEvent) -> None:
        self._events.append(event)
        self._wake()

    def fail(self, error: BaseException) -> None:
        """Nothing more will come; what is here can still be read."""
        self._error = self._error or error
        self._wake()

    async def get(self) -> TokenEvent:
        """The next event. For one reader."""
        while not self._events:
            if self._error is not None:
                raise self._error
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        return self._events.popleft()

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)


class Channels:
    """The channels of one client, opened by ``open_channel``. Belongs to one event loop."""

    def __init__(self, open_channel: Callable[[ChannelRequest], Call]) -> None:
        self.client_id = uuid.uuid4().hex
        self._open_channel = open_channel
        self._mailboxes: dict[str, _Mailbox] = {}
        self._requests: defaultdict[str, set[str]] = defaultdict(set)
        """Worker → ids of the requests that it has accepted."""
        self._readers: dict[str, set[_Mailbox]] = {}
        """Channel → mailboxes of the requests that have moved to it; the channels that are there."""
        self._pumps: dict[str, asyncio.Task[None]] = {}
        """Worker → what reads its channel, or still waits for it."""

    def expect(self, request_id: str) -> _Mailbox:
        """Events of the request may come. :meth:`leave` it in the end."""
        return self._mailboxes.setdefault(request_id, _Mailbox())

    def accepted(self, worker_id: str, request_id: str) -> None:
        """The request is at this worker; a channel is opened if that pays."""
        if request_id not in self._mailboxes:
            return
        requests = self._requests[worker_id]
        requests.add(request_id)
        if len(requests) >= WORTH_A_CHANNEL and worker_id not in self._pumps:
            # in a context of its own: Serve would take the channel for a part of the HTTP request that comes first
            pump = self._pump(ChannelRequest(self.client_id, uuid.uuid4().hex, worker_id))
            self._pumps[worker_id] = asyncio.get_running_loop().create_task(pump, context=Context())

    def moved(self, mailbox: _Mailbox, channel_id: str) -> None:
        """The request's further events come to ``mailbox`` by this channel, or an error if that is no more."""
        readers = self._readers.get(channel_id)
        if readers is None:
            mailbox.fail(_lost())
        else:
            readers.add(mailbox)

    def leave(self, request_id: str, worker_id: str | None) -> None:
        """Nobody reads the request's events any more. May be said again."""
        if (mailbox := self._mailboxes.pop(request_id, None)) is not None:
            for readers in self._readers.values():
                readers.discard(mailbox)
        if worker_id is not None and worker_id in self._requests:
            self._requests[worker_id].discard(request_id)
            if not self._requests[worker_id]:
                del self._requests[worker_id]

    def check_idle(self) -> None:
        """Raise ``AssertionError`` when something of a request or a channel is left."""
        assert not self._mailboxes and not self._requests and not self._readers and not self._pumps

    async def _pump(self, asked: ChannelRequest) -> None:
        """Read a channel to its end, at which all that moved to it and have not had their last event are lost."""
        self._readers[asked.channel_id] = set()
        try:
            async for batch in self._open_channel(asked):
                assert isinstance(batch, EventBatch)
                for event in batch.events:
                    if (mailbox := self._mailboxes.get(event.request_id)) is not None:
                        mailbox.put(event)
        except WorkerLostError as error:
            logger.info("the channel of worker %s is no more: %s", asked.worker_id, error)
        except Exception:  # it is no request's own failure: they go on elsewhere
            logger.exception("the channel of worker %s failed", asked.worker_id)
        finally:
            del self._pumps[asked.worker_id]
            for mailbox in self._readers.pop(asked.channel_id):
                mailbox.fail(_lost())


class Replacement:
    """How long a request that no worker has waits while there is none at all, and none starts in place of the last.

    ``running`` says whether one answers. Workers that are all full are running: who waits for a place waits on.
    """

    def __init__(self, running: Callable[[], Awaitable[bool]], deadline_s: float) -> None:
        self._running = running
        self._deadline_s = deadline_s

    async def check(self, since_s: float | None) -> float | None:
        """Since when, in the event loop's time, there is no worker; ``None``: there is one. ``since_s`` is what it said
        before. Raises :class:`NoWorkerError` when that is too long."""
        asked_s = asyncio.get_running_loop().time()
        if await self._running():
            return None
        if since_s is not None and asked_s - since_s >= self._deadline_s:
            raise NoWorkerError(
                f"no worker is running, and none has started for {self._deadline_s:g} s (--replacement-deadline-s); "
                "see the log of the server for why, and send the request again later"
            )
        return asked_s if since_s is None else since_s


class ChanneledStream:
    """A :class:`.streams.TokenStream`: one request's events, by its own ``call`` or by its worker's channel."""

    def __init__(self, call: Call, channels: Channels, request_id: str, replacement: Replacement | None = None) -> None:
        self._call = call
        self._channels = channels
        self._request_id = request_id
        self._worker_id: str | None = None
        self._mailbox = channels.expect(request_id)
        self._rest: asyncio.Task[None] | None = None
        self._opening: asyncio.Future[RequestNews | EventBatch] | None = None
        self._begun = False
        self._replacement = replacement
        self._alone_since_s: float | None = None

    def __aiter__(self) -> AsyncIterator[TokenEvent]:
        return self

    async def __anext__(self) -> TokenEvent:
        try:
            event = await (self._from_call() if self._rest is None else self._mailbox.get())
        except BaseException:
            self._leave()
            if self._opening is not None:
                self._opening.cancel()
            raise
        if event.finish_reason is not None:
            self._leave()
        return event

    def cancel(self) -> None:
        self._call.cancel()
        self._leave()

    async def _from_call(self) -> TokenEvent:
        while True:
            news = await (anext(self._call) if self._begun else self._first())
            if isinstance(news, TokenEvent):
                return news
            if isinstance(news, Accepted):
                self._worker_id = news.worker_id
                self._channels.accepted(news.worker_id, self._request_id)
            elif isinstance(news, Moved):
                self._channels.moved(self._mailbox, news.channel_id)
                self._rest = asyncio.get_running_loop().create_task(self._to_the_end())
                self._rest.add_done_callback(self._over)
                return await self._mailbox.get()

    async def _first(self) -> RequestNews | EventBatch:
        """What comes first by the call. While no worker has the request: that it waits, from time to time."""
        if self._opening is None:
            self._opening = asyncio.ensure_future(anext(self._call))
            self._opening.add_done_callback(_forget)
        while not self._opening.done():
            await asyncio.wait({self._opening}, timeout=SIGN_OF_LIFE_S)
            if not self._opening.done() and not self._call.assigned:
                if self._replacement is not None:
                    self._alone_since_s = await self._replacement.check(self._alone_since_s)
                return TokenEvent(self._request_id, (), "", waiting=True)
        self._begun = True
        return self._opening.result()

    async def _to_the_end(self) -> None:
        async for news in self._call:
            raise AssertionError(f"{news} came after the request had moved")

    def _over(self, rest: asyncio.Task[None]) -> None:
        """The call ended. If that was well, the last event comes by the channel, and may come later."""
        if not rest.cancelled() and (error := rest.exception()) is not None:
            self._mailbox.fail(error)

    def _leave(self) -> None:
        if self._rest is not None:
            self._rest.cancel()
        self._channels.leave(self._request_id, self._worker_id)


def _forget(opening: "asyncio.Future[RequestNews | EventBatch]") -> None:
    """What a call that was given up says in the end is of no use."""
    if not opening.cancelled():
        opening.exception()


def _lost() -> WorkerLostError:
    return WorkerLostError("the worker of this request died; send the request again")
