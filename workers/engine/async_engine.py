"""Runs the engine in a thread, for callers in an asyncio event loop."""

import asyncio
import logging
import os
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from forecache.workers.core.grammar import Matcher
from forecache.workers.core.requests import SIGN_OF_LIFE_S, GenerateRequest, TokenEvent
from forecache.workers.core.stats import EngineStats
from forecache.workers.engine.engine import Engine
from forecache.workers.errors import EngineDeadError, EngineHungError, ForecacheError, InvalidRequestError

logger = logging.getLogger(__name__)

IDLE_WAIT_S = 1.0
JOIN_CHECK_S = 1.0


@dataclass
class _Stream:
    """The events of one request on their way to its caller.

    Attributes:
        beats: of the engine's pulse, when the last event came.
        news: the events; an exception ends the stream, and ``None`` means that the engine has ended.
        quiet: no event has come since signs of life were last due.
    """

    beats: int
    news: asyncio.Queue[TokenEvent | BaseException | None] = field(default_factory=asyncio.Queue)
    quiet: bool = False


class AsyncEngine:
    """Runs ``engine`` in its own thread until :meth:`close`. All coroutines belong to one event loop.

    ``niceness``: added to that of the process, for the engine's thread and the threads that it starts.
    """

    def __init__(self, engine: Engine, *, niceness: int = 0) -> None:
        self._engine = engine
        self._niceness = niceness
        self._inbox: deque[tuple[GenerateRequest, Future[None], float, Matcher | None]] = deque()
        self._streams: dict[str, _Stream] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._signs: asyncio.TimerHandle | None = None
        self._checks: deque[Future[None]] = deque()
        self._inbox_lock = threading.Lock()
        self._closing = False
        self._ended = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="forecache-engine", daemon=True)
        self._thread.start()

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenEvent, None]:
        """The request's events, the last with a finish reason. Leaving the iteration early cancels the request.

        Without other events, a ``waiting`` event comes every ``SIGN_OF_LIFE_S`` while the engine advances: within a
        long step too, and before the engine has accepted the request. An engine that hangs sends none.

        Raises:
            InvalidRequestError: the request can't be served; comes before all events except ``waiting`` ones.
            EngineDeadError: the engine has ended.
        """
        request_id = request.request_id
        if request_id in self._streams:
            raise InvalidRequestError(f"request id '{request_id}' is running already", param="request_id")
        stream = _Stream(self._engine.pulse.beats)
        accepted: Future[None] = Future()
        self._loop = asyncio.get_running_loop()
        self._streams[request_id] = stream
        if self._signs is None:
            self._signs = self._loop.call_later(SIGN_OF_LIFE_S, self._give_signs)

        def answered(answer: asyncio.Future[None]) -> None:
            if not answer.cancelled() and (error := answer.exception()) is not None:
                stream.news.put_nowait(error)

        running = True
        try:
            await self._post(request, accepted)
            asyncio.wrap_future(accepted).add_done_callback(answered)
            while running:
                event = await stream.news.get()
                if event is None:
                    raise self._dead()
                if isinstance(event, BaseException):
                    raise event
                running = event.finish_reason is None
                yield event
        finally:
            del self._streams[request_id]
            if not self._streams and self._signs is not None:
                self._signs.cancel()
                self._signs = None
            # a request that the engine has not seen is withdrawn, and of a refused one it keeps nothing; neither is
            # cancelled, because its id may be used again before the cancellation arrives
            refused = accepted.done() and not accepted.cancelled() and accepted.exception() is not None
            if running and not refused and not accepted.cancel():
                self.cancel(request_id)

    def cancel(self, request_id: str) -> None:
        """End a request soon; ignores unknown ids."""
        self._engine.cancel(request_id)

    async def check_integrity(self) -> None:
        """:meth:`Engine.check_integrity`, between two steps."""
        checked: Future[None] = Future()
        with self._inbox_lock:
            if self._ended:
                raise self._dead()
            self._checks.append(checked)
        self._engine.wake()
        await asyncio.wrap_future(checked)

    def stats(self) -> EngineStats:
        return self._engine.stats()

    @property
    def alive(self) -> bool:
        return not self._ended

    def check_health(self) -> None:
        """Raise :class:`EngineDeadError` if the engine's thread has ended, or :class:`EngineHungError` if it hangs.

        All requests then end with that error, so that other workers can serve them.
        """
        if self.alive and self._hung():
            silent_s, deadline_s = self._engine.pulse.silent_s, self._engine.config.step_deadline_s
            self._failure = EngineHungError(
                f"the engine hangs: it has requests, but nothing was done for {silent_s:.0f} s; a layer, step or copy "
                f"may take {deadline_s:g} s (--step-deadline-s). Serve replaces the worker; others take its requests"
            )
            logger.error("%s", self._failure)
            self._end()
        if not self.alive:
            raise self._dead()

    def _hung(self) -> bool:
        return self._engine.pulse.silent_s > self._engine.config.step_deadline_s

    def _dead(self) -> EngineDeadError:
        if isinstance(self._failure, EngineHungError):
            return EngineHungError(str(self._failure))
        error = EngineDeadError(f"the engine has stopped: {self._failure or 'closed'}")
        error.__cause__ = self._failure
        return error

    def close(self) -> None:
        """Cancel all requests and end the thread. A thread that hangs is abandoned, and ends with the process."""
        self._closing = True
        self._engine.wake()
        while self._thread.is_alive():
            self._thread.join(JOIN_CHECK_S)
            if self._hung():
                logger.error("the engine's thread hangs; it is abandoned and ends with the process")
                return

    async def _post(self, request: GenerateRequest, accepted: Future[None]) -> None:
        arrived_s, matcher = time.perf_counter(), None
        if request.sampling.grammar is not None:  # not in the engine's thread, where all requests would wait
            matcher = await asyncio.to_thread(self._engine.grammars.matcher, request.sampling)
        with self._inbox_lock:
            if self._ended:
                raise self._dead()
            self._inbox.append((request, accepted, arrived_s, matcher))
        self._engine.wake()

    def _run(self) -> None:
        try:
            os.nice(self._niceness)  # on Linux this affects the calling thread only
            self._engine.pulse.beat()
            while not (self._closing or self._ended):
                while self._inbox:
                    self._accept(*self._inbox.popleft())
                while self._checks:
                    self._check(self._checks.popleft())
                if events := self._engine.step():
                    self._call_soon(self._deliver, events)
                if self._engine.idle and not self._inbox and not self._closing:
                    self._engine.pulse.rest()
                    self._engine.wait_for_work(IDLE_WAIT_S)
                    self._engine.pulse.beat()
            self._engine.close()
        except BaseException as error:
            logger.exception("the engine stopped")
            self._failure = self._failure or error
        finally:
            self._end()

    def _accept(
        self, request: GenerateRequest, accepted: Future[None], arrived_s: float, matcher: Matcher | None
    ) -> None:
        if not accepted.set_running_or_notify_cancel():
            return
        try:
            self._engine.add_request(request, arrived_s, matcher)
        except ForecacheError as error:
            accepted.set_exception(error)
        except Exception as error:  # such as a bug in a tokenizer or grammar: only this request fails
            logger.exception("the request %s could not be added", request.request_id)
            failure = ForecacheError("the request could not be added; the worker's log has the details")
            failure.__cause__ = error
            accepted.set_exception(failure)
        else:
            accepted.set_result(None)

    def _check(self, checked: Future[None]) -> None:
        if not checked.set_running_or_notify_cancel():
            return
        try:
            self._engine.check_integrity()
        except AssertionError as error:
            checked.set_exception(error)
        else:
            checked.set_result(None)

    def _call_soon(self, call: Callable[..., None], *args: object) -> None:
        """Call ``call`` in the callers' event loop; at most once a step, because waking the loop is expensive."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(call, *args)

    def _deliver(self, events: Sequence[TokenEvent]) -> None:
        beats = self._engine.pulse.beats
        for event in events:
            if (stream := self._streams.get(event.request_id)) is not None:
                stream.news.put_nowait(event)
                stream.beats, stream.quiet = beats, False

    def _give_signs(self) -> None:
        """Send a ``waiting`` event to each quiet stream, if the engine has advanced."""
        beats = self._engine.pulse.beats
        for request_id, stream in self._streams.items():
            if stream.quiet and stream.beats != beats:
                stream.news.put_nowait(TokenEvent(request_id, (), "", waiting=True))
                stream.beats = beats
            stream.quiet = True
        self._signs = asyncio.get_running_loop().call_later(SIGN_OF_LIFE_S, self._give_signs)

    def _deliver_end(self) -> None:
        for stream in self._streams.values():
            stream.news.put_nowait(None)

    def _end(self) -> None:
        """End all streams and waiting calls: the engine has ended."""
        with self._inbox_lock:
            self._ended = True
        while self._inbox:
            _, accepted, _, _ = self._inbox.popleft()
            if accepted.set_running_or_notify_cancel():
                accepted.set_exception(self._dead())
        while self._checks:
            checked = self._checks.popleft()
            if checked.set_running_or_notify_cancel():
                checked.set_exception(self._dead())
        self._call_soon(self._deliver_end)
