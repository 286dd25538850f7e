"""Indexers in other processes, with local scoring while one of them is unavailable (docs/architecture.md)."""

import logging
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from forecache.indexer.serving.protocol import Indexer, Prediction, PredictRequest

logger = logging.getLogger(__name__)

FIRST_BACKOFF_S = 0.5
MOST_BACKOFF_S = 30.0


class IndexerUnavailableError(RuntimeError):
    """The indexer actor is dead or too slow; scoring in this process (`LocalIndexer`) still works."""


@dataclass
class _Peer:
    """One of the indexers. It gets no request before ``retry_s`` of the clock; ``backoff_s``: delay after a failure."""

    indexer: Indexer
    retry_s: float = 0.0
    backoff_s: float = FIRST_BACKOFF_S


class SharedIndexers:
    """Routes each sequence to one of several indexers, by a hash of the sequence id. Thread-safe.

    An indexer that fails with :class:`IndexerUnavailableError` gets no requests for a while (exponential backoff).
    Meanwhile an indexer in this process, which ``make_local`` creates at first use, scores its sequences.
    """

    def __init__(
        self,
        indexers: Sequence[Indexer],
        make_local: Callable[[], Indexer],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._peers = [_Peer(indexer) for indexer in indexers]
        self._make_local = make_local
        self._clock = clock
        self._local: Indexer | None = None
        self._lock = threading.Lock()
        self.fallbacks = 0
        """Predictions made in this process because an indexer was unavailable."""

    def predict(self, request: PredictRequest) -> Future[Prediction]:
        peer = self._peers[zlib.crc32(request.sequence_id.encode()) % len(self._peers)]
        if self._clock() < peer.retry_s:
            return self._here(request)
        answer: Future[Prediction] = Future()
        answer.set_running_or_notify_cancel()
        peer.indexer.predict(request).add_done_callback(lambda asked: self._settle(peer, request, asked, answer))
        return answer

    def close(self) -> None:
        for peer in self._peers:
            peer.indexer.close()
        with self._lock:
            if self._local is not None:
                self._local.close()

    def _here(self, request: PredictRequest) -> Future[Prediction]:
        with self._lock:
            self.fallbacks += 1
            if self._local is None:
                self._local = self._make_local()
            return self._local.predict(request)

    def _settle(
        self, peer: _Peer, request: PredictRequest, asked: Future[Prediction], answer: Future[Prediction]
    ) -> None:
        error = None if asked.cancelled() else asked.exception()
        if not isinstance(error, IndexerUnavailableError):
            peer.backoff_s = FIRST_BACKOFF_S
            _copy(asked, answer)
            return
        now = self._clock()
        if now >= peer.retry_s:  # requests that fail together count as one failure
            logger.warning("scoring in the worker; the indexer is asked again in %.1f s: %s", peer.backoff_s, error)
            peer.retry_s = now + peer.backoff_s
            peer.backoff_s = min(2 * peer.backoff_s, MOST_BACKOFF_S)
        try:
            self._here(request).add_done_callback(lambda here: _copy(here, answer))
        except RuntimeError as closed:
            answer.set_exception(closed)


def _copy(source: Future[Prediction], target: Future[Prediction]) -> None:
    if source.cancelled():
        target.set_exception(IndexerUnavailableError("the indexer was closed"))
    elif (error := source.exception()) is not None:
        target.set_exception(error)
    else:
        target.set_result(source.result())
