"""The indexer as Ray actors of one node. The node's workers share them; they map the node's arena."""

import asyncio
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayActorError

from forecache.indexer.records.index_spec import IndexSpec
from forecache.indexer.serving.fallback import IndexerUnavailableError
from forecache.indexer.serving.lookahead import LookaheadScorer
from forecache.indexer.serving.protocol import Prediction, PredictRequest
from forecache.indexer.serving.scorer import Attach, LocalIndexer
from forecache.indexer.serving.telemetry import SILENCE, MetricsTarget, Telemetry


@ray.remote(num_cpus=0)
class IndexerActor:
    """A :class:`.scorer.LocalIndexer` for the workers of a node. It scores waiting requests in batches.

    ``attach`` maps the arena at a path. It is pickled, so it must be a module-level function.
    """

    def __init__(
        self,
        spec: IndexSpec,
        threads: int,
        attach: Attach,
        lookahead: LookaheadScorer | None = None,
        telemetry: Telemetry = SILENCE,
        name: str = "indexer",
    ) -> None:
        self._indexer = LocalIndexer(spec, threads, attach, lookahead)
        node_id = ray.get_runtime_context().get_node_id()
        self._telemetry = telemetry.start("indexer", name, node_id, self._indexer.stats)

    async def predict(self, request: PredictRequest) -> Prediction:
        # a coroutine, so that Ray delivers further requests while this one waits and they form a batch
        return await asyncio.wrap_future(self._indexer.predict(request))

    async def ready(self) -> None:
        """Return once the actor can score."""

    async def metrics_target(self) -> MetricsTarget | None:
        return self._telemetry.target


class RemoteIndexer:
    """An :class:`.protocol.Indexer` that calls an :class:`IndexerActor`.

    A future fails with :class:`IndexerUnavailableError` when the actor dies or has not answered within ``deadline_s``,
    and with the actor's error if the request was invalid. :meth:`close` does not end the actor.
    """

    def __init__(self, handle: "ActorHandle[Any]", deadline_s: float) -> None:
        self._handle = handle
        self._deadline_s = deadline_s
        # one waiting thread is enough, because the actor answers in order
        self._waiter = ThreadPoolExecutor(1, thread_name_prefix="forecache-indexer-wait")

    def predict(self, request: PredictRequest) -> Future[Prediction]:
        answer: ray.ObjectRef[Prediction] = self._handle.predict.remote(request)
        return self._waiter.submit(self._wait, answer, time.monotonic() + self._deadline_s)

    def close(self) -> None:
        """Cancel pending answers. Returns within ``deadline_s``."""
        self._waiter.shutdown(wait=True, cancel_futures=True)

    def _wait(self, answer: "ray.ObjectRef[Prediction]", deadline: float) -> Prediction:
        try:
            return ray.get(answer, timeout=max(0.0, deadline - time.monotonic()))
        except GetTimeoutError as error:
            raise IndexerUnavailableError(f"the indexer actor did not answer within {self._deadline_s:g} s") from error
        except RayActorError as error:
            raise IndexerUnavailableError(f"the indexer actor is gone: {error}") from error
