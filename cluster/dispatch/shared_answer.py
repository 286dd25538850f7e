"""Answers that every process of the cluster is asked for, shared by all who want them at about the same time."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

FRESH_S = 1.0
"""So old an answer may be. Prometheus and probes ask less often; asking more often costs no other process anything."""

T = TypeVar("T")


class SharedAnswer(Generic[T]):
    """What ``ask`` answers, or raises. One question is under way at most, and its answer stands for ``fresh_s``.

    To be used from one event loop. A caller that is cancelled does not take the answer from the others.
    """

    def __init__(
        self,
        ask: Callable[[], Awaitable[T]],
        fresh_s: float = FRESH_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ask = ask
        self._fresh_s = fresh_s
        self._clock = clock
        self._task: asyncio.Task[T] | None = None
        self._answered_s = 0.0

    async def get(self) -> T:
        """Raises what ``ask`` raises."""
        if self._task is None or (self._task.done() and self._clock() - self._answered_s > self._fresh_s):
            self._task = asyncio.create_task(self._answer())
            # those who asked may be gone before it ends
            self._task.add_done_callback(lambda task: task.cancelled() or task.exception())
        return await asyncio.shield(self._task)

    async def _answer(self) -> T:
        try:
            return await self._ask()
        finally:
            self._answered_s = self._clock()
