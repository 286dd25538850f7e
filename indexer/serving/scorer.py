"""Prediction in this process, from index records in a mapped arena."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from forecache.indexer.records.entry_scores import chunk_scores, record_figures
from forecache.indexer.records.index_spec import IndexSpec
from forecache.indexer.records.scores import scores_and_events
from forecache.indexer.serving.lookahead import Asked, LookaheadScorer
from forecache.indexer.serving.protocol import IndexerStats, Prediction, PredictRequest


class ArenaIndexView(Protocol):
    """The part of a mapped arena that scoring uses."""

    @property
    def index(self) -> torch.Tensor:
        """uint8 [slots, index_nbytes]: one record per slot, sharing the mapping."""
        ...

    @property
    def index_fingerprint(self) -> str:
        """:attr:`IndexSpec.fingerprint` of the records."""
        ...

    def generation(self, slots: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
        """Current generations of ``slots``, both [n]."""
        ...

    def sound_records(self, slots: npt.NDArray[np.int64], generations: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Which of ``slots`` still have these ``generations`` and undamaged records: bool [n]. Call it after reading
        the records."""
        ...


Attach = Callable[[str], ArenaIndexView]
"""Maps the arena at a path."""
BATCH_REQUESTS = 8
"""Most requests in a batch; the first waits until the records of the last are read."""


@dataclass(frozen=True)
class Read:
    """Results of reading one request's records, all on one device.

    ``chunks``: int64 [n], the chunks whose records could be read, in any order; ``lse``: float32 [query heads, n], or
    for records of kind "entries" the entries' logits, [entries of a chunk, n]; ``local_lse``: float32 [query heads].
    """

    request: PredictRequest
    chunks: Tensor
    lse: Tensor
    local_lse: Tensor


def read_records(
    spec: IndexSpec, arena: ArenaIndexView, request: PredictRequest, lookahead: LookaheadScorer | None = None
) -> Read:
    """Log-sum-exps of the queries over the records that can be read.

    A slot's generation is checked before its record is read, and again afterwards together with the record's checksum.
    Records of reused slots, and damaged ones, are left out. Raises ValueError if the
    arena's records are of another kind than ``spec``, or the request contradicts itself.
    """
    check_kind(spec, arena)
    check_state(request, lookahead)
    rows = spec if lookahead is None else lookahead.spec
    # copies, because torch.from_numpy does not take the read-only arrays that Ray delivers
    queries, local_lse = torch.tensor(request.queries), torch.tensor(request.local_lse)
    weights = None if request.weights is None else torch.tensor(request.weights)
    asked, local = where_records_are(request)
    readable = asked[request.index_slots[asked] < len(arena.index)]
    chunks = readable[unchanged(arena, request, readable)]
    while True:
        slots = torch.from_numpy(request.index_slots[chunks])
        lse = record_figures(rows, arena.index, queries, weights, slots)
        sound = verified(arena, request, chunks)
        if sound.all():
            break
        # one damaged record would spoil the softmax over all records
        chunks = chunks[sound]
    here = record_figures(rows, torch.tensor(request.local_records), queries, weights)
    read = torch.from_numpy(np.concatenate([chunks, local]))
    return Read(request, read, torch.cat([lse, here], 1), local_lse)


def score(spec: IndexSpec, lookahead: LookaheadScorer | None, reads: Sequence[Read]) -> list[Tensor]:
    """For each request float32 [2, chunks], on the device of ``reads``: scores of all chunks, and the mass of the
    retrieval events of the model's own heads.

    Chunks that could not be read get the lowest score; without ``lookahead``, where scores are attention shares, it is
    0.
    """
    found = [_by_own_heads(spec, read) for read in reads]
    if lookahead is None:
        return found
    # a request without chunks has nothing to score
    with_chunks = [(read, figures) for read, figures in zip(reads, found, strict=True) if figures.shape[1]]
    asked = [
        Asked(
            lse=_in_order(read.lse, read, -torch.inf),
            local_lse=read.local_lse,
            hidden=torch.tensor(state.hidden).to(read.lse.device, non_blocking=True),
            position=state.position,
            steps=state.steps,
        )
        for read, _ in with_chunks
        if (state := read.request.state) is not None
    ]
    for (read, figures), scores in zip(with_chunks, lookahead.scores(asked) if asked else (), strict=True):
        # a trained indexer may give a high score to an unread chunk because of its place
        figures[0] = scores.amin()
        figures[0, read.chunks] = scores[read.chunks]
    return found


def _by_own_heads(spec: IndexSpec, read: Read) -> Tensor:
    """Scores and events by the model's own heads, the last rows: float32 [2, chunks], 0 if unread."""
    if spec.kind == "entries":
        scores = chunk_scores(spec, read.lse)
        return _in_order(torch.stack([scores, torch.zeros_like(scores)]), read, 0.0)
    own = slice(len(read.lse) - len(spec.query_heads), None)
    return _in_order(scores_and_events(spec, read.lse[own], read.local_lse[own]), read, 0.0)


def _in_order(values: Tensor, read: Read, unread: float) -> Tensor:
    """``values`` [rows, read] in the order of the request's chunks: [rows, chunks]; ``unread`` for the others."""
    ordered = values.new_full((len(values), len(read.request.index_slots)), unread)
    ordered[:, read.chunks] = values
    return ordered


def prediction(
    spec: IndexSpec, request: PredictRequest, read: npt.NDArray[np.int64], found: npt.NDArray[np.float32]
) -> Prediction:
    """The answer to ``request`` from ``found`` [2, chunks], a result of :func:`score`. Chunks in the arena that are not
    in ``read`` are reported as missing."""
    unread = request.index_slots >= 0
    unread[read] = False
    # bounds are not attention, and cover all heads instead of the retrieval heads
    events = found[1] if spec.kind == "tokens" else None
    return Prediction(request.sequence_id, found[0], tuple(np.flatnonzero(unread).tolist()), events)


def check_state(request: PredictRequest, lookahead: LookaheadScorer | None) -> None:
    """Raise ValueError if ``request`` does not fit ``lookahead``."""
    if (request.state is None) != (lookahead is None):
        raise ValueError("request and indexer differ in whether the indexer is trained: give both one --indexer")
    if lookahead is None or request.state is None:
        return
    state, manifest = request.state, lookahead.manifest
    shape = (len(manifest.target_layers), manifest.hidden_size)
    chunks = (state.position + 1) // lookahead.spec.chunk_tokens
    if state.hidden.shape != shape or state.steps < 1 or chunks != len(request.index_slots):
        raise ValueError(
            f"hidden states of shape {state.hidden.shape}, {state.steps} steps, {len(request.index_slots)} chunks at "
            f"position {state.position}: expected {shape}, at least one step and {chunks} chunks"
        )


def check_kind(spec: IndexSpec, arena: ArenaIndexView) -> None:
    """Raise ValueError if the arena's records are of another kind than ``spec``."""
    if arena.index_fingerprint != spec.fingerprint:
        raise ValueError(
            f"the arena holds index keys {arena.index_fingerprint}, this indexer reads {spec.fingerprint}: start both "
            "with the same manifest and chunk size"
        )


def where_records_are(request: PredictRequest) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Chunks whose records are in the arena, and chunks whose records ``request`` contains: int64 [n] each.

    Raises ValueError if the number of records in the request differs from the number of chunks without a slot.
    """
    asked, local = np.flatnonzero(request.index_slots >= 0), np.flatnonzero(request.index_slots < 0)
    if len(local) != len(request.local_records):
        raise ValueError(
            f"{len(local)} chunks have no slot, but {len(request.local_records)} records are in the request"
        )
    return asked, local


def unchanged(arena: ArenaIndexView, request: PredictRequest, chunks: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Which of ``chunks`` have slots with the generation that the request expects: bool [n]."""
    now = arena.generation(request.index_slots[chunks]).astype(np.int64)
    same: npt.NDArray[np.bool_] = now == request.generations[chunks]
    return same


def verified(arena: ArenaIndexView, request: PredictRequest, chunks: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Which of ``chunks``, whose records were just read, still have the same slot and a valid checksum: bool [n]."""
    sound = unchanged(arena, request, chunks)
    still = chunks[sound]
    sound[sound] = arena.sound_records(request.index_slots[still], request.generations[still])
    return sound


def _use_threads(threads: int) -> None:
    """Torch operators that the calling thread starts use ``threads`` threads."""
    torch.get_num_threads()  # torch's first call in a thread would overwrite the number set below
    torch.set_num_threads(threads)


class LocalIndexer:
    """An :class:`.protocol.Indexer` in this process, with one worker thread.

    ``threads``: CPU threads for scoring. ``attach`` is called once per arena path, and again after a prediction with
    missing chunks, because a new arena may exist at the same path. ``lookahead``: the trained indexer, on the CPU,
    whose :attr:`.lookahead.LookaheadScorer.own` is ``spec``. Waiting requests are scored in batches of up to
    ``BATCH_REQUESTS``.
    """

    def __init__(self, spec: IndexSpec, threads: int, attach: Attach, lookahead: LookaheadScorer | None = None) -> None:
        self._spec = spec
        self._attach = attach
        self._lookahead = lookahead
        self._arenas: dict[str, ArenaIndexView] = {}
        self._waiting: deque[tuple[PredictRequest, Future[Prediction]]] = deque()
        self._answered = self._failed = 0
        self._predict_s = 0.0
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="forecache-indexer")
        # set_num_threads also changes the default for threads that start later: restore it
        others = torch.get_num_threads()
        self._pool.submit(_use_threads, threads).result()
        torch.set_num_threads(others)

    def predict(self, request: PredictRequest) -> Future[Prediction]:
        answer: Future[Prediction] = Future()
        self._waiting.append((request, answer))
        try:
            self._pool.submit(self._answer_waiting)
        except RuntimeError:
            self._waiting.remove((request, answer))
            raise
        return answer

    def stats(self) -> IndexerStats:
        """Totals since the start. Thread-safe."""
        return IndexerStats(self._answered, self._failed, self._predict_s, len(self._waiting))

    def close(self) -> None:
        """Finish the running predictions, cancel the waiting ones, and unmap the arenas."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        for _, answer in self._waiting:
            answer.cancel()
        self._waiting.clear()
        self._arenas.clear()

    def _answer_waiting(self) -> None:
        """Answer waiting requests, oldest first. An invalid request does not affect the others."""
        start_s = time.perf_counter()
        reads: list[tuple[Read, Future[Prediction]]] = []
        while self._waiting and len(reads) < BATCH_REQUESTS:
            request, answer = self._waiting.popleft()
            if not answer.set_running_or_notify_cancel():
                continue
            try:
                reads.append((self._read(request), answer))
            except BaseException as error:  # noqa: BLE001 - the future raises it in the caller
                self._failed += 1
                answer.set_exception(error)
        try:
            scores = score(self._spec, self._lookahead, [read for read, _ in reads])
        except BaseException as error:  # noqa: BLE001 - the futures raise it in the callers
            self._failed += len(reads)
            for _, answer in reads:
                answer.set_exception(error)
            return
        for (read, answer), scored in zip(reads, scores, strict=True):
            found = prediction(self._spec, read.request, read.chunks.numpy(), scored.numpy())
            if found.missing:
                self._arenas.pop(read.request.arena_path, None)
            self._answered += 1
            answer.set_result(found)
        self._predict_s += time.perf_counter() - start_s

    def _read(self, request: PredictRequest) -> Read:
        path = request.arena_path
        if path not in self._arenas:
            self._arenas[path] = self._attach(path)
        return read_records(self._spec, self._arenas[path], request, self._lookahead)
