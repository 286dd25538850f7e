"""The events of all choices of one HTTP request, from the workers to the response.

Everything that can happen to a choice is decided here, once:

- *finished*: its last event has a finish reason (:meth:`CompletionStream._next`).
- *failed over*: its worker is lost, and another one continues it (:meth:`CompletionStream._fail_over`).
- *ended early*: its worker stops without a last event, which counts as lost (:meth:`CompletionStream._receive`).
- *cancelled*: the response ends before the choice does (:meth:`CompletionStream.close`).
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator

from forecache.cluster.dispatch.admission import Ticket
from forecache.cluster.dispatch.channels import RequestCall
from forecache.cluster.dispatch.choice_requests import ChoiceRequests
from forecache.cluster.dispatch.failover import Failover
from forecache.cluster.dispatch.workers import ServeWorkers
from forecache.cluster.errors import (
    AnswerFailedError,
    DeadlineError,
    NoWorkerError,
    WorkerLostError,
    WorkerSilentError,
)
from forecache.cluster.observe.request_record import RequestRecord
from forecache.workers.core.requests import TokenEvent
from forecache.workers.errors import (
    ChunkLostError,
    ForecacheError,
    InvalidRequestError,
    NonFiniteError,
    OverloadedError,
)

logger = logging.getLogger(__name__)

SILENCE_S = 5.0
"""After this long without an event the reader gets ``None``, so that it can keep the connection alive."""
MAX_RUNNING = 128
"""Choices of one request that run at once, since events of all of them may come together."""
OPENED_AT_ONCE = 8
"""Choices that are opened, or events that are returned, before other tasks of the event loop run."""


class Turns:
    """Counts work, and lets other tasks of the event loop run after every ``units`` of it."""

    def __init__(self, units: int) -> None:
        self._units = units
        self._done = 0

    async def did(self, units: int = 1) -> None:
        """Count ``units`` of work."""
        self._done += units
        if self._done >= self._units:
            self._done = 0
            await asyncio.sleep(0)


class _Choice:
    """One choice: the call to the worker that has it now, and what another worker would need to continue it."""

    call: RequestCall

    def __init__(self, index: int, failover: Failover) -> None:
        self.index = index
        self.failover = failover
        self.finished = False
        self.no_worker_since_s: float | None = None


class CompletionStream:
    """Runs the choices of an admitted request and returns their events. :meth:`close` it at the end.

    The first choice of a prompt runs ahead; the prompt's other choices start with its first token, when the prompt's
    chunks are stored and they can reuse them. ``deadline_s`` limits the whole request, in seconds from now.
    """

    def __init__(
        self,
        requests: ChoiceRequests,
        workers: ServeWorkers,
        ticket: Ticket,
        record: RequestRecord,
        *,
        deadline_s: float | None = None,
        silence_s: float = SILENCE_S,
    ) -> None:
        self.count = requests.count
        self.per_prompt = requests.per_prompt
        self._requests = requests
        self._workers = workers
        self._ticket = ticket
        self._record = record
        self._silence_s = silence_s
        self._timeout_s = deadline_s
        self._end_s = None if deadline_s is None else time.monotonic() + deadline_s
        self._unopened = deque(range(0, self.count, self.per_prompt))
        self._begun_prompts: set[int] = set()
        self._choices: dict[int, _Choice] = {}
        self._pulls: dict[asyncio.Task[TokenEvent], _Choice] = {}
        self._ready: deque[asyncio.Task[TokenEvent]] = deque()
        self._news = asyncio.Event()
        self._closed = False

    async def start(self, wait_s: float) -> None:
        """Wait up to ``wait_s`` for the first event, so that a refusal can still become an HTTP status.

        Raises what refuses the request, and :class:`DeadlineError`.
        """
        self._open(self._unopened.popleft())
        if await self._wait(wait_s):
            self._ready[0].result()

    async def events(self) -> AsyncIterator[tuple[int, TokenEvent] | None]:
        """(choice, event) until all choices have finished; ``None`` after each ``silence_s`` without an event.

        The cost of an event does not depend on the number of choices.

        Raises the typed error of the first choice that fails, and :class:`DeadlineError`.
        """
        turns = Turns(OPENED_AT_ONCE)
        while self._unopened or self._pulls:
            for _ in range(min(len(self._unopened), MAX_RUNNING - len(self._pulls), OPENED_AT_ONCE)):
                self._open(self._unopened.popleft())
            if self._unopened and len(self._pulls) < MAX_RUNNING:
                await asyncio.sleep(0)
            elif not await self._wait(self._silence_s):
                yield None
            for _ in range(len(self._ready)):
                if self._closed:
                    return
                pull = self._ready.popleft()
                choice = self._pulls.pop(pull)
                event = pull.result()
                if not choice.finished:
                    self._pull(choice)
                if event.token_ids or choice.finished:
                    self._open_siblings(choice.index)
                yield choice.index, event
                await turns.did()

    def close(self) -> None:
        """Cancel the choices that have not finished, and end the request's record and ticket. Can be repeated.

        Synchronous, since the task that calls it may be one that is being cancelled and can't await.
        """
        self._closed = True
        for pull in self._pulls:
            pull.cancel()
        self._pulls.clear()
        self._ready.clear()
        self._unopened.clear()
        for choice in self._choices.values():
            if not choice.finished:
                choice.finished = True
                choice.call.cancel()
        self._news.set()
        self._record.close()
        self._ticket.close()

    def _open(self, index: int) -> None:
        self._record.opened(index)
        request = self._requests.choice(index)
        choice = _Choice(index, Failover(request, self._workers.failover_config))
        choice.call = self._workers.start(request)
        self._choices[index] = choice
        self._pull(choice)

    def _open_siblings(self, index: int) -> None:
        """Open the other choices of a prompt whose first choice, ``index``, has begun."""
        if index % self.per_prompt == 0 and index not in self._begun_prompts:
            self._begun_prompts.add(index)
            self._unopened.extend(range(index + 1, index + self.per_prompt))

    def _pull(self, choice: _Choice) -> None:
        pull = asyncio.ensure_future(self._next(choice))
        self._pulls[pull] = choice
        pull.add_done_callback(self._pulled)

    def _pulled(self, pull: "asyncio.Task[TokenEvent]") -> None:
        if not pull.cancelled():
            pull.exception()  # marks it as retrieved: the reader may be gone
        if pull in self._pulls:
            self._ready.append(pull)
            self._news.set()

    async def _next(self, choice: _Choice) -> TokenEvent:
        """The choice's next event for the reader, from as many workers as it takes."""
        while True:
            try:
                event = await self._receive(choice)
            except NoWorkerError:
                raise  # another try would wait for the same worker to start
            except WorkerLostError as error:
                if self._closed:
                    raise  # a cancelled call looks lost, and Serve may swallow the cancellation of this task
                await self._fail_over(choice, error)
            else:
                if not event.waiting:
                    break
        choice.finished = event.finish_reason is not None
        self._record.observe(choice.index, event)
        if event.token_ids:
            self._ticket.begun(choice.index)
        if (failure := _error_of(event)) is not None:
            raise failure
        return event

    async def _receive(self, choice: _Choice) -> TokenEvent:
        """The next event of the choice's worker, or of the queue before the workers.

        A worker that makes progress sends an event from time to time, even in one long step (``TokenEvent.waiting``).

        Raises :class:`WorkerLostError` when the worker is lost or silent, and :class:`NoWorkerError` when none runs.
        """
        deadline_s = self._workers.failover_config.token_deadline_s
        try:
            async with asyncio.timeout(deadline_s):
                event = await anext(choice.call)
        except TimeoutError as error:
            raise WorkerSilentError(f"the worker sent nothing for {deadline_s:g} s") from error
        except StopAsyncIteration:
            raise WorkerLostError("the worker ended the answer early") from None
        if event.waiting:
            if not choice.call.assigned:
                choice.no_worker_since_s = await self._workers.check_running(choice.no_worker_since_s)
            return event
        return choice.failover.accept(event)

    async def _fail_over(self, choice: _Choice, error: WorkerLostError) -> None:
        """Send the choice to another worker after a pause. Raises :class:`WorkerLostError` when a limit is reached."""
        choice.call.cancel()
        pause_s = choice.failover.pause_s(error)
        request_id, tokens = choice.failover.request.request_id, len(choice.failover.tokens)
        logger.warning("%s fails over to another worker after %d tokens: %s", request_id, tokens, error)
        await asyncio.sleep(pause_s)
        self._record.resumed()
        choice.call = self._workers.start(choice.failover.next_request())

    async def _wait(self, wait_s: float) -> bool:
        """Wait up to ``wait_s`` for news; return whether there are any. Raises :class:`DeadlineError`."""
        left_s = None if self._end_s is None else max(self._end_s - time.monotonic(), 0.0)
        if self._ready:
            return True
        self._news.clear()
        try:
            async with asyncio.timeout(wait_s if left_s is None else min(wait_s, left_s)):
                await self._news.wait()
        except TimeoutError as error:
            if left_s is not None and left_s <= wait_s:
                late = f"the answer was not complete within timeout_s = {self._timeout_s:g} s"
                raise DeadlineError(late) from error
            return False
        return True


def _error_of(event: TokenEvent) -> ForecacheError | None:
    """The error that a worker reports with ``event``, typed."""
    if event.too_large:
        return InvalidRequestError(event.error or "the request is larger than all memory", param="messages")
    if event.overloaded:
        return OverloadedError(event.error or "no room")
    if event.chunks_lost:
        return ChunkLostError(event.error or "stored chunks of the request were lost")
    if event.non_finite:
        return NonFiniteError(event.error or "the model computed infinity or NaN")
    if event.finish_reason == "error":
        return AnswerFailedError(event.error or "the worker failed without saying why")
    return None
