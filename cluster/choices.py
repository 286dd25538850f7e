"""Several answers to one HTTP request: their events as one stream, within one deadline."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable

from forecache.cluster.errors import DeadlineError
from forecache.cluster.streams import EventStream
from forecache.workers.decode.messages import TokenEvent


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

        Raises what went wrong with any of them, and :class:`DeadlineError` when the time is over.
        """
        if self.count == 1:  # nearly always: it needs no task for each event
            async for event in self._alone():
                yield 0, event
            return
        for leader in range(0, self.count, self.per_prompt):
            self._ask(leader)
        while self._pending:
            done, _ = await asyncio.wait(self._pending, timeout=self._left_s(), return_when=asyncio.FIRST_COMPLETED)
            if not done:
                raise self._late()
            for task in done:
                index = self._pending.pop(task)
                event = task.result()
                if event is None or event.finish_reason is None:
                    self._ask(index)
                if event is not None and (event.token_ids or event.finish_reason is not None):
                    self._follow(index)
                yield index, event

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
        for stream in self._streams.values():
            stream.close()
        self._closed()

    def _follow(self, index: int) -> None:
        """Start the choices that waited for choice ``index``."""
        if index % self.per_prompt == 0:
            for follower in range(index + 1, index + self.per_prompt):
                if follower not in self._streams:
                    self._ask(follower)

    def _ask(self, index: int) -> None:
        if index not in self._iterators:
            self._iterators[index] = aiter(self._stream(index).events())
        self._pending[asyncio.ensure_future(self._next(index))] = index

    async def _next(self, index: int) -> TokenEvent | None:
        return await anext(self._iterators[index])

    def _stream(self, index: int) -> EventStream:
        if index not in self._streams:
            self._streams[index] = self._open(index)
        return self._streams[index]
