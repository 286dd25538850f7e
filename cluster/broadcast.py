"""Asks all replicas of a deployment, and shares one answer between callers that ask at about the same time."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar

FRESH_S = 1.0
"""An answer is reused for this long. Prometheus and probes ask less often; asking more often costs nothing more."""

T = TypeVar("T")


class ReplicaAnswer(Protocol):
    """One replica's pending answer."""

    async def get_async(self) -> Any: ...


class Broadcast(Protocol):
    """Ray Serve's :class:`~ray.serve.handle.DeploymentBroadcastResponse`."""

    async def _fetch_replica_results_async(self) -> Sequence[ReplicaAnswer]: ...


async def answers_in_time(broadcast: Broadcast, deadline_s: float) -> list[Any]:
    """The answer, or the exception, of every replica that responds within ``deadline_s``; silent replicas are left out.

    Serve's own ``results_async`` raises ``TimeoutError`` for all replicas when one of them is silent.

    Raises:
        TimeoutError: Serve doesn't know the replicas by then.
        DeploymentUnavailableError: there is no replica.
    """
    end_s = time.monotonic() + deadline_s
    async with asyncio.timeout(deadline_s):
        replicas = await broadcast._fetch_replica_results_async()
    if not replicas:
        return []
    answers = [asyncio.ensure_future(replica.get_async()) for replica in replicas]
    try:
        answered, _ = await asyncio.wait(answers, timeout=max(end_s - time.monotonic(), 0.0))
    finally:
        for answer in answers:
            answer.cancel()
    return [
        answer.exception() or answer.result() for answer in answers if answer in answered and not answer.cancelled()
    ]


class SharedAnswer(Generic[T]):
    """Caches the result of ``ask`` for ``fresh_s`` seconds and runs at most one ``ask`` at a time.

    For one event loop. A caller that is cancelled does not cancel the question for the others.
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
        """The result of ``ask``. Raises what ``ask`` raises."""
        if self._task is None or (self._task.done() and self._clock() - self._answered_s > self._fresh_s):
            self._task = asyncio.create_task(self._answer())
            self._task.add_done_callback(_retrieve_error)
        return await asyncio.shield(self._task)

    async def _answer(self) -> T:
        try:
            return await self._ask()
        finally:
            self._answered_s = self._clock()


def _retrieve_error(task: "asyncio.Task[Any]") -> None:
    """Mark the error as retrieved: all callers may have been cancelled, and asyncio would log it."""
    if not task.cancelled():
        task.exception()
