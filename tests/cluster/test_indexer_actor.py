"""The indexer actor, in a separate process, scores the chunks of a real arena."""

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from processes import kill_for_good, process_of

from forecache.indexer.records.index_spec import IndexSpec, encode_chunks
from forecache.indexer.serving.actor import IndexerActor, RemoteIndexer
from forecache.indexer.serving.fallback import IndexerUnavailableError, SharedIndexers
from forecache.indexer.serving.protocol import PredictRequest
from forecache.indexer.serving.scorer import LocalIndexer
from forecache.workers.memory.arena.arena import Arena
from forecache.workers.memory.arena.store import ArenaStore
from forecache.workers.memory.format.layout import attention_layout

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("by_value", "one_node")]

LAYOUT = attention_layout("m", layers=2, kv_heads=1, head_dim=16, chunk_tokens=16, dtype=torch.float32)
SPEC = IndexSpec("tokens", ((0, 0), (1, 1)), ((0, 0), (1, 0)), (0, 1), 16, 16, 0.25, torch.int8)
CHUNKS = 12


@pytest.fixture
def arena(tmp_path: Path) -> Iterator[Arena]:
    arena = Arena.create(
        tmp_path,
        "test",
        layout=LAYOUT,
        index_nbytes=SPEC.nbytes,
        index_fingerprint=SPEC.fingerprint,
        capacity_bytes=(4 << 20) + CHUNKS * LAYOUT.nbytes,
    )
    yield arena
    arena.close()
    arena.unlink()


@pytest.fixture
def request_of_stored_chunks(arena: Arena) -> PredictRequest:
    """Chunks with random index keys, stored as a worker does; the third one is only in the hot pool."""
    store = ArenaStore(arena)
    reservations = store.reserve_slots("worker/s", [bytes([number]) * 16 for number in range(1, CHUNKS + 1)])
    generator = torch.Generator().manual_seed(0)
    records = encode_chunks(SPEC, torch.randn(CHUNKS, 2, 16, 16, generator=generator))
    for reservation, record in zip(reservations, records, strict=True):
        arena.index[reservation.ref.slot] = record
        arena.seal(reservation.ref, reservation.key, arena.digests(reservation.ref.slot))
    store.commit("worker/s", [(reservation.key, reservation.ref) for reservation in reservations])
    slots = np.array([reservation.ref.slot for reservation in reservations], dtype=np.int64)
    slots[2] = -1  # not in the arena yet: its record comes along
    return PredictRequest(
        "s",
        str(arena.path),
        slots,
        np.array([reservation.ref.generation for reservation in reservations], dtype=np.int64),
        torch.randn(2, 16, generator=generator).numpy(),
        np.zeros(2, dtype=np.float32),
        records[2:3].numpy(),
    )


def start(spec: IndexSpec = SPEC, attach: Any = Arena.attach, deadline_s: float = 60) -> tuple[Any, RemoteIndexer]:
    actor_class: Any = IndexerActor
    actor = actor_class.remote(spec, 1, attach)
    return actor, RemoteIndexer(actor, deadline_s)


def test_the_actor_scores_as_the_worker_would(request_of_stored_chunks: PredictRequest) -> None:
    local = LocalIndexer(SPEC, 1, Arena.attach)
    expected = local.predict(request_of_stored_chunks).result(60)
    local.close()
    _, remote = start()
    prediction = remote.predict(request_of_stored_chunks).result(60)
    remote.close()
    assert prediction.sequence_id == "s"
    assert prediction.missing == ()
    assert prediction.scores.min() > 0
    np.testing.assert_array_equal(prediction.scores, expected.scores)


def test_chunks_that_were_given_away_are_missing(arena: Arena, request_of_stored_chunks: PredictRequest) -> None:
    _, remote = start()
    request_of_stored_chunks.generations[5] += 1
    assert remote.predict(request_of_stored_chunks).result(60).missing == (5,)
    remote.close()


def test_answers_come_to_those_who_asked(request_of_stored_chunks: PredictRequest) -> None:
    _, remote = start()
    requests = [
        PredictRequest(
            f"s{number}",
            request_of_stored_chunks.arena_path,
            request_of_stored_chunks.index_slots[: number + 1],
            request_of_stored_chunks.generations[: number + 1],
            request_of_stored_chunks.queries,
            request_of_stored_chunks.local_lse,
            request_of_stored_chunks.local_records[: int(number >= 2)],
        )
        for number in range(CHUNKS)
    ]
    futures = [remote.predict(request) for request in requests]
    for number, future in enumerate(futures):
        prediction = future.result(60)
        assert (prediction.sequence_id, len(prediction.scores)) == (f"s{number}", number + 1)
    remote.close()


def test_an_arena_with_other_index_keys_is_refused(request_of_stored_chunks: PredictRequest) -> None:
    other = IndexSpec("tokens", ((0, 0),), ((0, 0),), (0,), 16, 16, 0.25, torch.int8)
    _, remote = start(other)
    with pytest.raises(ValueError, match="same manifest"):
        remote.predict(request_of_stored_chunks).result(60)
    remote.close()


def test_a_dead_actor_is_named(request_of_stored_chunks: PredictRequest) -> None:
    actor, remote = start()
    remote.predict(request_of_stored_chunks).result(60)
    kill_for_good(actor)
    with pytest.raises(IndexerUnavailableError, match="gone"):
        remote.predict(request_of_stored_chunks).result(60)
    remote.close()


def never_mapped(path: str) -> Arena:
    time.sleep(3600)
    return Arena.attach(path)


def test_an_actor_that_hangs_is_given_up_at_the_deadline(request_of_stored_chunks: PredictRequest) -> None:
    actor, remote = start(attach=never_mapped, deadline_s=0.5)
    with pytest.raises(IndexerUnavailableError, match=r"did not answer within 0\.5 s"):
        remote.predict(request_of_stored_chunks).result(60)
    remote.close()
    ray.kill(actor)


def test_an_actor_that_dies_is_stood_in_for_and_asked_again(request_of_stored_chunks: PredictRequest) -> None:
    """The actor is killed while requests run: no prediction is lost, and it scores again once Ray has restarted it."""
    actor_class: Any = IndexerActor
    actor = actor_class.options(max_restarts=-1).remote(SPEC, 1, Arena.attach)
    ray.get(actor.ready.remote(), timeout=60)
    shared = SharedIndexers([RemoteIndexer(actor, 60)], lambda: LocalIndexer(SPEC, 1, Arena.attach))
    expected = shared.predict(request_of_stored_chunks).result(60)
    assert shared.fallbacks == 0
    pid = process_of(actor)
    os.kill(pid, signal.SIGSTOP)  # so that none of them is answered before
    answers = [shared.predict(request_of_stored_chunks) for _ in range(4)]
    os.kill(pid, signal.SIGKILL)
    for answer in answers:
        np.testing.assert_array_equal(answer.result(60).scores, expected.scores)
    assert shared.fallbacks == 4
    deadline_s = time.monotonic() + 60
    asked_again = False
    while not asked_again:
        assert time.monotonic() < deadline_s, "the restarted actor is never asked again"
        time.sleep(0.2)
        before = shared.fallbacks
        np.testing.assert_array_equal(shared.predict(request_of_stored_chunks).result(60).scores, expected.scores)
        asked_again = shared.fallbacks == before
    shared.close()
    ray.kill(actor)


def test_actors_share_sequences(request_of_stored_chunks: PredictRequest) -> None:
    """A sequence always uses the same actor. With one of two gone, the worker scores only that one's sequences."""
    started = [start() for _ in range(2)]
    shared = SharedIndexers([remote for _, remote in started], lambda: LocalIndexer(SPEC, 1, Arena.attach))
    requests = [replace(request_of_stored_chunks, sequence_id=f"s{number}") for number in range(16)]
    for request in requests:
        assert shared.predict(request).result(60).sequence_id == request.sequence_id
    kill_for_good(started[0][0])
    for answer in [shared.predict(request) for request in requests]:
        answer.result(60)
    assert 0 < shared.fallbacks < 16
    shared.close()
    ray.kill(started[1][0])
