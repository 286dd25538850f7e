"""Prediction in this process, over index keys that lie in a mapped arena."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from forecache.indexer.index_keys import IndexSpec, chunk_lse, scores_and_events
from forecache.indexer.protocol import Prediction, PredictRequest


class ArenaIndexView(Protocol):
    """What scoring needs of a mapped arena."""

    @property
    def index(self) -> torch.Tensor:
        """uint8 [slots, index_nbytes]: one record per slot, sharing the mapping."""
        ...

    @property
    def index_fingerprint(self) -> str:
        """:attr:`IndexSpec.fingerprint` of the records."""
        ...

    def generation(self, slots: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
        """Generations of ``slots``, both [n], as they are now."""
        ...


Attach = Callable[[str], ArenaIndexView]
"""Maps the arena at a path."""


def predict(spec: IndexSpec, arena: ArenaIndexView, request: PredictRequest) -> Prediction:
    """Score the chunks of ``request`` whose records can be read, here or in the request; the others get 0.

    A slot's generation is read before its record and again after it: one that was given away meanwhile, or already
    had been, is ``missing``. Raises ValueError if the arena's records are of another kind than ``spec``.
    """
    check_kind(spec, arena)
    # copies: what came from another process is read-only, which torch.from_numpy does not take
    queries, local_lse = torch.tensor(request.queries), torch.tensor(request.local_lse)
    asked, local = where_records_are(request)
    readable = asked[request.index_slots[asked] < len(arena.index)]
    chunks = readable[unchanged(arena, request, readable)]
    while True:
        slots = torch.from_numpy(request.index_slots[chunks])
        lse = chunk_lse(spec, arena.index, queries, slots)
        sound = unchanged(arena, request, chunks)
        if sound.all():
            break
        # a half-written record spoils the softmax of all the others
        chunks = chunks[sound]
    here = chunk_lse(spec, torch.tensor(request.local_records), queries)
    found = scores_and_events(spec, torch.cat([lse, here], 1), local_lse).numpy()
    return prediction(spec, request, np.concatenate([chunks, local]), found)


def prediction(
    spec: IndexSpec, request: PredictRequest, read: npt.NDArray[np.int64], found: npt.NDArray[np.float32]
) -> Prediction:
    """The answer to ``request`` from what the records of the chunks ``read`` gave: ``found`` [2, read] as of
    :func:`.index_keys.scores_and_events`. Chunks of the arena that are not among them are missing."""
    figures = np.zeros((2, len(request.index_slots)), dtype=np.float32)
    figures[:, read] = found
    missing = np.setdiff1d(np.flatnonzero(request.index_slots >= 0), read)
    # bounds are no attention, and of all heads
    events = figures[1] if spec.kind == "tokens" else None
    return Prediction(request.sequence_id, figures[0], tuple(missing.tolist()), events)


def check_kind(spec: IndexSpec, arena: ArenaIndexView) -> None:
    """Raise ValueError if the arena's records are of another kind than ``spec``."""
    if arena.index_fingerprint != spec.fingerprint:
        raise ValueError(
            f"the arena holds index keys {arena.index_fingerprint}, this indexer reads {spec.fingerprint}: start both "
            "with the same manifest and chunk size"
        )


def where_records_are(request: PredictRequest) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Chunks whose records are in the arena, and those whose records came with ``request``: int64 [n] each.

    Raises ValueError where their numbers contradict.
    """
    asked, local = np.flatnonzero(request.index_slots >= 0), np.flatnonzero(request.index_slots < 0)
    if len(local) != len(request.local_records):
        raise ValueError(f"{len(local)} chunks have no slot, but {len(request.local_records)} records came along")
    return asked, local


def unchanged(arena: ArenaIndexView, request: PredictRequest, chunks: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Which of ``chunks`` have slots that still have the generations asked for: bool [n]."""
    now = arena.generation(request.index_slots[chunks]).astype(np.int64)
    same: npt.NDArray[np.bool_] = now == request.generations[chunks]
    return same


def _use_threads(threads: int) -> None:
    """Torch's operators started by the calling thread use ``threads`` threads."""
    torch.get_num_threads()  # torch sets a thread's number at its first use, over what was set before
    torch.set_num_threads(threads)


class LocalIndexer:
    """An :class:`forecache.indexer.protocol.Indexer` with one thread of its own, in this process.

    ``threads``: CPU threads of the scoring itself. ``attach`` is called once per arena path, and again after a
    prediction that had something missing: the arena may have been made anew under the same path.
    """

    def __init__(self, spec: IndexSpec, threads: int, attach: Attach) -> None:
        self._spec = spec
        self._attach = attach
        self._arenas: dict[str, ArenaIndexView] = {}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="forecache-indexer")
        # torch keeps one number per thread, and one more that threads started later begin with: put that back
        others = torch.get_num_threads()
        self._pool.submit(_use_threads, threads).result()
        torch.set_num_threads(others)

    def predict(self, request: PredictRequest) -> Future[Prediction]:
        return self._pool.submit(self._predict, request)

    def close(self) -> None:
        """Finish the prediction under way, drop those that wait, unmap the arenas."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._arenas.clear()

    def _predict(self, request: PredictRequest) -> Prediction:
        path = request.arena_path
        if path not in self._arenas:
            self._arenas[path] = self._attach(path)
        prediction = predict(self._spec, self._arenas[path], request)
        if prediction.missing:
            del self._arenas[path]
        return prediction
