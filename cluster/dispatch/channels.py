"""The ingress' end of calls and channels to workers.

Each request has its own call, which lasts as long as the request. Once an ingress has several requests at one
worker, it also opens a channel there: one streaming call that carries the events of all these requests, a step's events
in one message. :mod:`forecache.workers.engine.channels` is the worker's end, and says why.
"""

import asyncio
import logging
import uuid
from collections import defaultdict, deque
from collections.abc import AsyncIterator
from contextvars import Context
from typing import Any

import grpc
from ray.exceptions import RayActorError, RayTaskError, TaskCancelledError
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from forecache.cluster.errors import WorkerLostError, WorkerSilentError
from forecache.workers.core.requests import (
    SIGN_OF_LIFE_S,
    Accepted,
    ChannelRequest,
    EventBatch,
    GenerateRequest,
    Moved,
    Refused,
    RequestNews,
    TokenEvent,
)
from forecache.workers.errors import EngineDeadError, EngineHungError

logger = logging.getLogger(__name__)

MIN_CHANNEL_REQUESTS = 2
"""Requests at one worker that are worth a channel: a single request has no other to share messages with."""


class ServeCall:
    """A streaming call of a worker through Ray Serve, with Ray's errors turned into ours.

    Iteration raises :class:`WorkerLostError`, or the error that the worker raised or refused the request with.
    ``cancel`` can be called at any time and never waits.
    """

    def __init__(self, response: "DeploymentResponseGenerator[Any]") -> None:
        self._response = response

    @classmethod
    def open(cls, method: "DeploymentHandle[Any]", request: GenerateRequest | ChannelRequest) -> "ServeCall":
        """Call ``method`` of a worker, ``generate`` or ``channel``.

        Here the request leaves this process. Ray Serve asks ``PrefixAffinityRouter.choose_replicas`` (router.py), in a
        thread of this process, for a worker, and calls ``DecodeWorker`` (workers/engine/worker.py) in that process.
        """
        # Serve identifies a call that waits for a replica by the id of the HTTP request in whose context it is made.
        # Each call gets a new context: of several calls in one context only one would ever return.
        response = Context().run(method.remote, request)
        assert isinstance(response, DeploymentResponseGenerator)
        return cls(response)

    @property
    def assigned(self) -> bool:
        """Whether a worker has the call. Before that it waits for a worker to have room, or to start."""
        return bool(self._response._replica_result_future.done())

    def __aiter__(self) -> AsyncIterator[RequestNews | EventBatch]:
        return self

    async def __anext__(self) -> RequestNews | EventBatch:
        try:
            news: RequestNews | EventBatch = await self._response.__anext__()
        except RayTaskError as error:
            # Ray raises the worker's exception as a class that is both RayTaskError and the exception's own
            cause = getattr(error, "cause", error)
            if isinstance(cause, EngineDeadError):
                raise _engine_lost(cause) from error
            raise cause from None
        except EngineDeadError as error:
            raise _engine_lost(error) from error
        except (RayActorError, TaskCancelledError, grpc.aio.AioRpcError) as error:
            raise _worker_died() from error
        except DeploymentUnavailableError as error:
            raise WorkerLostError("no worker is running") from error
        if isinstance(news, Refused):
            raise news.error
        return news

    def cancel(self) -> None:
        self._response.cancel()  # type: ignore[no-untyped-call]


def _engine_lost(error: EngineDeadError) -> WorkerLostError:
    kind = WorkerSilentError if isinstance(error, EngineHungError) else WorkerLostError
    return kind(f"the worker of this request failed: {error}")


def _worker_died() -> WorkerLostError:
    return WorkerLostError("the worker of this request died; send the request again")


class _Mailbox:
    """Events of one request that came by a channel and were not read yet. For one reader."""

    def __init__(self) -> None:
        self._events: deque[TokenEvent] = deque()
        self._error: BaseException | None = None
        self._reader: asyncio.Future[None] | None = None

    def put(self, event: TokenEvent) -> None:
        self._events.append(event)
        self._wake()

    def fail(self, error: BaseException) -> None:
        """No more events come. Those that are here can still be read; then the reader gets ``error``."""
        self._error = self._error or error
        self._wake()

    async def get(self) -> TokenEvent:
        """Wait for the next event."""
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
    """The channels of one ingress to the workers behind ``handle``, a streaming one. For one event loop."""

    def __init__(self, handle: "DeploymentHandle[Any]") -> None:
        self.client_id = uuid.uuid4().hex
        self._handle = handle
        self._mailboxes: dict[str, _Mailbox] = {}
        self._requests: defaultdict[str, set[str]] = defaultdict(set)
        """Worker → ids of the requests that it has accepted."""
        self._readers: dict[str, set[_Mailbox]] = {}
        """Open channel → mailboxes of the requests that moved to it."""
        self._pumps: dict[str, asyncio.Task[None]] = {}
        """Worker → the task that opens and reads its channel."""

    def expect(self, request_id: str) -> _Mailbox:
        """Make a mailbox for the request. Call :meth:`leave` at its end."""
        return self._mailboxes.setdefault(request_id, _Mailbox())

    def accepted(self, worker_id: str, request_id: str) -> None:
        """Note that the worker has accepted the request; opens a channel to the worker if that pays."""
        if request_id not in self._mailboxes:
            return
        requests = self._requests[worker_id]
        requests.add(request_id)
        if len(requests) >= MIN_CHANNEL_REQUESTS and worker_id not in self._pumps:
            # In a new context: else Serve would count the channel as a part of the HTTP request that opens it
            pump = self._pump(ChannelRequest(self.client_id, uuid.uuid4().hex, worker_id))
            self._pumps[worker_id] = asyncio.get_running_loop().create_task(pump, context=Context())

    def moved(self, mailbox: _Mailbox, channel_id: str) -> None:
        """Deliver the request's further events to ``mailbox``, or an error if the channel has ended."""
        readers = self._readers.get(channel_id)
        if readers is None:
            mailbox.fail(_worker_died())
        else:
            readers.add(mailbox)

    def leave(self, request_id: str, worker_id: str | None) -> None:
        """Drop the request's events from now on. Can be repeated."""
        if (mailbox := self._mailboxes.pop(request_id, None)) is not None:
            for readers in self._readers.values():
                readers.discard(mailbox)
        if worker_id is not None and worker_id in self._requests:
            self._requests[worker_id].discard(request_id)
            if not self._requests[worker_id]:
                del self._requests[worker_id]

    def open(self, request: ChannelRequest) -> ServeCall:
        """Open a channel. The worker's end is ``DecodeWorker.channel``."""
        return ServeCall.open(self._handle.channel, request)

    def check_idle(self) -> None:
        """Raise ``AssertionError`` if a request or a channel is left."""
        assert not self._mailboxes and not self._requests and not self._readers and not self._pumps

    async def _pump(self, request: ChannelRequest) -> None:
        """Read a channel to its end. Then all requests that moved to it and have not finished are lost."""
        self._readers[request.channel_id] = set()
        try:
            async for batch in self.open(request):
                assert isinstance(batch, EventBatch)
                for event in batch.events:
                    if (mailbox := self._mailboxes.get(event.request_id)) is not None:
                        mailbox.put(event)
        except WorkerLostError as error:
            logger.info("the channel to worker %s ended: %s", request.worker_id, error)
        except Exception:  # the requests fail over, so the error is none of theirs
            logger.exception("the channel to worker %s failed", request.worker_id)
        finally:
            del self._pumps[request.worker_id]
            for mailbox in self._readers.pop(request.channel_id):
                mailbox.fail(_worker_died())


class RequestCall:
    """The events of one request at one worker, by its own ``call`` or by the worker's channel.

    Iteration raises what :class:`ServeCall` raises. ``cancel`` can be called at any time and never waits.
    """

    def __init__(self, call: ServeCall, channels: Channels, request_id: str) -> None:
        self._call = call
        self._channels = channels
        self._request_id = request_id
        self._worker_id: str | None = None
        self._mailbox = channels.expect(request_id)
        self._first: asyncio.Future[RequestNews | EventBatch] | None = None
        self._begun = False
        self._rest: asyncio.Task[None] | None = None

    @property
    def assigned(self) -> bool:
        """Whether a worker has the request. Before that its events only say that it still waits."""
        return self._call.assigned

    def __aiter__(self) -> AsyncIterator[TokenEvent]:
        return self

    async def __anext__(self) -> TokenEvent:
        try:
            event = await (self._from_call() if self._rest is None else self._mailbox.get())
        except BaseException:
            self._leave()
            raise
        if event.finish_reason is not None:
            self._leave()
        return event

    def cancel(self) -> None:
        self._call.cancel()
        self._leave()

    async def _from_call(self) -> TokenEvent:
        while True:
            news = await (anext(self._call) if self._begun else self._first_news())
            if isinstance(news, TokenEvent):
                return news
            if isinstance(news, Accepted):
                self._worker_id = news.worker_id
                self._channels.accepted(news.worker_id, self._request_id)
            elif isinstance(news, Moved):
                self._channels.moved(self._mailbox, news.channel_id)
                self._rest = asyncio.get_running_loop().create_task(self._wait_for_end())
                self._rest.add_done_callback(self._ended)
                return await self._mailbox.get()

    async def _first_news(self) -> RequestNews | EventBatch:
        """The call's first message; every ``SIGN_OF_LIFE_S`` a waiting event while no worker has the request."""
        if self._first is None:
            self._first = asyncio.ensure_future(anext(self._call))
            self._first.add_done_callback(_retrieve_error)
        while not self._first.done():
            await asyncio.wait({self._first}, timeout=SIGN_OF_LIFE_S)
            if not self._first.done() and not self._call.assigned:
                return TokenEvent(self._request_id, (), "", waiting=True)
        self._begun = True
        return self._first.result()

    async def _wait_for_end(self) -> None:
        async for news in self._call:
            raise AssertionError(f"{news} came by the call after the request had moved to a channel")

    def _ended(self, rest: "asyncio.Task[None]") -> None:
        """The call ended. Without an error the request's last event comes by the channel, perhaps later."""
        if not rest.cancelled() and (error := rest.exception()) is not None:
            self._mailbox.fail(error)

    def _leave(self) -> None:
        for waiting in (self._first, self._rest):
            if waiting is not None:
                waiting.cancel()
        self._channels.leave(self._request_id, self._worker_id)


def _retrieve_error(first: "asyncio.Future[RequestNews | EventBatch]") -> None:
    """Mark the error as retrieved: the reader may have left, and asyncio would log it."""
    if not first.cancelled():
        first.exception()
