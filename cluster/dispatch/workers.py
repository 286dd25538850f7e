"""The decode workers, as an ingress reaches them through Ray Serve."""

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from forecache.cluster.broadcast import SharedAnswer, answers_in_time
from forecache.cluster.config import ResumeConfig
from forecache.cluster.dispatch.channels import Channels, RequestCall, ServeCall
from forecache.cluster.errors import NoWorkerError, WorkerLostError
from forecache.workers.core.requests import GenerateRequest
from forecache.workers.core.stats import WorkerStats

logger = logging.getLogger(__name__)

STATS_DEADLINE_S = 5.0


class ServeWorkers:
    """All replicas of the decode deployment."""

    def __init__(self, handle: "DeploymentHandle[Any]", failover_config: ResumeConfig) -> None:
        self.failover_config = failover_config
        self._handle = handle
        # by value: a token by gRPC costs less than half of what it costs as an object of Ray's
        self._streaming = handle.options(stream=True, _by_reference=False)
        self._channels = Channels(self._streaming)
        self._stats = SharedAnswer(self._ask_stats)

    def start(self, request: GenerateRequest) -> RequestCall:
        """Send the request to the worker that the router chooses. Does not wait. The worker runs
        ``DecodeWorker.generate``."""
        sent = replace(request, client_id=self._channels.client_id)
        return RequestCall(ServeCall.open(self._streaming.generate, sent), self._channels, request.request_id)

    async def stats(self) -> Sequence[WorkerStats]:
        """Stats of the workers that answer within ``STATS_DEADLINE_S``, up to a second old: callers need no API key.

        Raises :class:`WorkerLostError` if no worker answers.
        """
        return await self._stats.get()

    async def check_running(self, no_worker_since_s: float | None) -> float | None:
        """Check that a request without a worker has one to wait for. Full workers count as running.

        ``no_worker_since_s`` is what the last check of the request returned: since when no worker has been running, in
        the event loop's time; ``None`` if one is. Raises :class:`NoWorkerError` after ``replacement_deadline_s``.
        """
        now_s = asyncio.get_running_loop().time()
        try:
            await self.stats()
        except WorkerLostError:
            pass
        else:
            return None
        deadline_s = self.failover_config.replacement_deadline_s
        if no_worker_since_s is not None and now_s - no_worker_since_s >= deadline_s:
            raise NoWorkerError(
                f"no worker is running, and none has started for {deadline_s:g} s (--replacement-deadline-s); "
                "see the log of the server for why, and send the request again later"
            )
        return now_s if no_worker_since_s is None else no_worker_since_s

    async def _ask_stats(self) -> Sequence[WorkerStats]:
        try:
            answers = await answers_in_time(self._handle.broadcast("stats"), STATS_DEADLINE_S)
        except (TimeoutError, DeploymentUnavailableError) as error:
            logger.warning("no worker answers: %s", error)
            raise WorkerLostError("no worker answers") from error
        reached = [answer for answer in answers if isinstance(answer, WorkerStats)]
        if not reached:
            raise WorkerLostError("no worker answers")
        return reached
