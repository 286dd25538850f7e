"""What all replicas of a deployment answer, where some of them do not."""

import asyncio
import time
from collections.abc import Sequence
from typing import Any, Protocol


class ReplicaAnswer(Protocol):
    """One replica's answer, on its way."""

    async def get_async(self) -> Any: ...


class Broadcast(Protocol):
    """Ray Serve's :class:`~ray.serve.handle.DeploymentBroadcastResponse`."""

    async def _fetch_replica_results_async(self) -> Sequence[ReplicaAnswer]: ...


async def answers_in_time(asked: Broadcast, deadline_s: float) -> list[Any]:
    """What those replicas answer that do so within ``deadline_s``, or the exception that came instead. Nothing of a
    replica that is silent: Serve's own ``results_async`` would raise ``TimeoutError`` for all because of it.

    Raises:
        TimeoutError: Serve does not know the replicas by then.
        DeploymentUnavailableError: there is none.
    """
    end_s = time.monotonic() + deadline_s
    async with asyncio.timeout(deadline_s):
        replicas = await asked._fetch_replica_results_async()
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
