"""Several answers to one HTTP request: their events as one stream, within one deadline."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable

from forecache.cluster.dispatch.completion_stream import EventStream
from forecache.cluster.dispatch.turns import Turns
from forecache.cluster.errors import DeadlineError
from forecache.workers.core.requests import TokenEvent

MOST_OPEN = 128
"""Choices of one request that run at once. The next are opened as these end: news of all of them may come together."""
OPENED_AT_ONCE = 8
"""Choices that are opened, or events taken, without a turn for others."""


class ChoiceStreams:
    """``per_prompt`` choices for each of ``prompts`` prompts; choice ``i`` answers prompt ``i // per_prompt``.

    ``open_stream`` starts a choice's request. Of a prompt's choices the first goes ahead: the others begin with its
    first token, when the prompt's chunks are there for them. ``close`` is synchronous, as that of :class:`EventStream`,
    and tells ``closed``.
    """

    def __init__(
        self,
        open_stream: Callable[[int], EventStream],
        prompts: int,
        per_prompt: int,
        deadline_s: float | None = None,
        closed: Callable[[], None] = lambda: None,
    ) -> None:
        self.count = prompts * per_prompt
        self.per_prompt = per_prompt
        self._open = open_stream
        self._closed = closed
        self._deadline_s = None if deadline_s is None else time.monotonic() + deadline_s
        self._timeout_s = deadline_s
        self._streams: dict[int, EventStream] = {}
        self._pending: dict[asyncio.Task[TokenEvent | None], int] = {}
        self._iterators: dict[int, AsyncIterator[TokenEvent | None]] = {}
        self._ready: deque[asyncio.Task[TokenEvent | None]] = deque()
        self._news = asyncio.Event()
        self._unopened: deque[int] = deque()
        self._followed: set[int] = set()

    async def start(self, wait_s: float) -> None:
        """Wait for the first event of the first choice, ``wait_s`` at most: what is refused fails before any answer.

        Raises what refuses it, and :class:`DeadlineError` when the time is over before that event.
        """
        left_s = self._left_s()
        begun = await self._stream(0).start(wait_s if left_s is None else min(wait_s, left_s))
        if not begun and left_s is not None and left_s <= wait_s:
            raise self._late()

    async def events(self) -> AsyncIterator[tuple[int, TokenEvent | None]]:
        """(choice, event) until every choice has had its last; ``None`` for one that has been silent.

        Each costs the same, however many choices there are. They are opened a few at a time, and ``MOST_OPEN`` run at
        once: the event loop has other streams.

        Raises what went wrong with any of them, and :class:`DeadlineError` when the time is over.
        """
        if self.count == 1:  # nearly always: it needs no task for each event
            async for event in self._alone():
                yield 0, event
            return
        self._unopened.extend(range(0, self.count, self.per_prompt))
        turns = Turns(OPENED_AT_ONCE)
        while self._unopened or self._pending:
            for _ in range(min(len(self._unopened), MOST_OPEN - len(self._pending), OPENED_AT_ONCE)):
                self._ask(self._unopened.popleft())
            if self._unopened and len(self._pending) < MOST_OPEN:
                await asyncio.sleep(0)
            elif not self._ready:
                await self._wait()
            for _ in range(len(self._ready)):
                task = self._ready.popleft()
                index = self._pending.pop(task)
                event = task.result()
                if event is None or event.finish_reason is None:
                    self._ask(index)
                if event is not None and (event.token_ids or event.finish_reason is not None):
                    self._follow(index)
                yield index, event
                await turns.did()

    async def _wait(self) -> None:
        """Until some choice has news."""
        self._news.clear()
        try:
            async with asyncio.timeout(self._left_s()):
                await self._news.wait()
        except TimeoutError as error:
            raise self._late() from error

    async def _alone(self) -> AsyncIterator[TokenEvent | None]:
        events = aiter(self._stream(0).events())
        left_s = self._left_s()
        end_s = None if left_s is None else asyncio.get_running_loop().time() + left_s
        while True:
            limit = asyncio.timeout_at(end_s)
            try:
                async with limit:
                    event = await anext(events)
            except StopAsyncIteration:
                return
            except TimeoutError as error:
                if limit.expired():
                    raise self._late() from error
                raise
            yield event

    def _left_s(self) -> float | None:
        return None if self._deadline_s is None else max(0.0, self._deadline_s - time.monotonic())

    def _late(self) -> DeadlineError:
        return DeadlineError(f"the answer was not complete within timeout_s = {self._timeout_s:g} s")

    def close(self) -> None:
        """Stop what is not over on its worker."""
        for task in self._pending:
            task.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody asks for it any more
            task.cancel()
        self._pending.clear()
        self._ready.clear()
        self._unopened.clear()
        for stream in self._streams.values():
            stream.close()
        self._closed()

    def _follow(self, index: int) -> None:
        """Start the choices that waited for choice ``index``."""
        if index % self.per_prompt == 0:
            for follower in range(index + 1, index + self.per_prompt):
                if follower not in self._followed:
                    self._followed.add(follower)
                    self._unopened.append(follower)

    def _ask(self, index: int) -> None:
        if index not in self._iterators:
            self._iterators[index] = aiter(self._stream(index).events())
        task = asyncio.ensure_future(self._next(index))
        self._pending[task] = index
        task.add_done_callback(self._done)

    def _done(self, task: "asyncio.Task[TokenEvent | None]") -> None:
        if task in self._pending:
            self._ready.append(task)
            self._news.set()

    async def _next(self, index: int) -> TokenEvent | None:
        return await anext(self._iterators[index])

    def _stream(self, index: int) -> EventStream:
        if index not in self._streams:
            self._streams[index] = self._open(index)
        return self._streams[index]
