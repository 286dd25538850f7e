"""Sequences are assigned to indexer actors, and the worker scores when one does not answer."""

from concurrent.futures import Future

import numpy as np
import pytest

from forecache.indexer.serving.fallback import FIRST_BACKOFF_S, MOST_BACKOFF_S, IndexerUnavailableError, SharedIndexers
from forecache.indexer.serving.protocol import Prediction, PredictRequest


def request(sequence_id: str) -> PredictRequest:
    none = np.zeros(0)
    return PredictRequest(sequence_id, "", none.astype(np.int64), none.astype(np.int64), none, none, none)


class Peer:
    """An indexer that answers, or fails with ``error``."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.error: Exception | None = None
        self.closed = False

    def predict(self, request: PredictRequest) -> Future[Prediction]:
        self.asked.append(request.sequence_id)
        answer: Future[Prediction] = Future()
        if self.error is not None:
            answer.set_exception(self.error)
        else:
            answer.set_result(Prediction(request.sequence_id, np.zeros(0, dtype=np.float32)))
        return answer

    def close(self) -> None:
        self.closed = True


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_sequence_always_asks_the_same_one_and_all_have_work() -> None:
    peers = [Peer() for _ in range(3)]
    shared = SharedIndexers(peers, Peer)
    for _ in range(2):
        for number in range(60):
            assert shared.predict(request(f"s{number}")).result(0).sequence_id == f"s{number}"
    for peer in peers:
        assert len(peer.asked) > 20 and len(set(peer.asked)) * 2 == len(peer.asked)
    again = [Peer() for _ in range(3)]
    other = SharedIndexers(again, Peer)
    for number in range(60):
        other.predict(request(f"s{number}"))
    assert [set(peer.asked) for peer in again] == [set(peer.asked) for peer in peers], "in every worker alike"
    assert shared.fallbacks == 0


def test_a_silent_one_is_left_alone_longer_each_time() -> None:
    peer, local, clock = Peer(), Peer(), Clock()
    shared = SharedIndexers([peer], lambda: local, clock)
    peer.error = IndexerUnavailableError("gone")
    pause = FIRST_BACKOFF_S
    for times in range(1, 9):
        assert shared.predict(request("s")).result(0).sequence_id == "s"
        assert len(peer.asked) == times, "asked once after each pause"
        clock.now += pause * 0.9
        shared.predict(request("s")).result(0)
        assert len(peer.asked) == times
        clock.now += pause * 0.2
        pause = min(2 * pause, MOST_BACKOFF_S)
    assert len(local.asked) == shared.fallbacks == 16
    peer.error = None
    shared.predict(request("s")).result(0)
    assert shared.fallbacks == 16
    peer.error = IndexerUnavailableError("gone again")
    shared.predict(request("s")).result(0)
    clock.now += FIRST_BACKOFF_S
    shared.predict(request("s")).result(0)
    assert len(peer.asked) == 8 + 1 + 2, "its pauses are short again"
    shared.close()
    assert peer.closed and local.closed


def test_a_wrong_request_is_nobodys_silence() -> None:
    peer = Peer()
    shared = SharedIndexers([peer], Peer)
    peer.error = ValueError("makes no sense")
    with pytest.raises(ValueError, match="no sense"):
        shared.predict(request("s")).result(0)
    peer.error = None
    shared.predict(request("s")).result(0)
    assert len(peer.asked) == 2 and shared.fallbacks == 0
