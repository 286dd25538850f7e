"""Prediction in this process on a GPU, which reads index records from the arena once and caches them."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate, pairwise
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from forecache.indexer.records.entry_scores import entry_logits
from forecache.indexer.records.index_spec import IndexSpec
from forecache.indexer.serving.lookahead import LookaheadScorer
from forecache.indexer.serving.protocol import Prediction, PredictRequest, StepState
from forecache.indexer.serving.scorer import (
    ArenaIndexView,
    Read,
    check_kind,
    check_state,
    prediction,
    score,
    unchanged,
    verified,
    where_records_are,
)
from forecache.indexer.serving.static_prediction import Places, StaticPredictions
from forecache.kernels.chunks import ops

ALIGNMENT_BYTES = 16
"""Arrays begin at multiples of this, because Triton compiles another variant for unaligned tensors."""


class Registration(Protocol):
    """Host memory that the GPU can read until it is closed."""

    def close(self) -> None: ...


class RecordCache:
    """A direct-mapped cache of index records in device memory, keyed by arena slot and generation. For one thread.

    The record of a slot can only be in row ``slot % rows``. ``records``: uint8 [rows, record bytes]. :meth:`find`
    returns a row from :meth:`keep`, which is called when its bytes are verified, until another record claims it.
    """

    def __init__(self, rows: int, record_bytes: int, device: torch.device) -> None:
        self.records = torch.zeros(rows, record_bytes, dtype=torch.uint8, device=device)
        self._slots = np.full(rows, -1, dtype=np.int64)
        self._generations = np.zeros(rows, dtype=np.int64)

    def find(self, slots: npt.NDArray[np.int64], generations: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Rows of the records of ``slots`` in these ``generations``, int64 [n] each; -1: not cached."""
        if not len(self._slots):
            return np.full_like(slots, -1)
        rows = slots % len(self._slots)
        found = (self._slots[rows] == slots) & (self._generations[rows] == generations)
        return np.where(found, rows, -1)

    def claim(self, slots: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Rows to write the records of ``slots`` to, int64 [n], all different; -1 if another of ``slots`` has the row.

        Removes the records that were in these rows from the cache.
        """
        rows = np.full_like(slots, -1)
        if len(self._slots):
            own, first = np.unique(slots % len(self._slots), return_index=True)
            rows[first] = own
            self._slots[own] = -1
        return rows

    def keep(
        self, rows: npt.NDArray[np.int64], slots: npt.NDArray[np.int64], generations: npt.NDArray[np.int64]
    ) -> None:
        """Mark the claimed ``rows`` as holding the records of ``slots`` in these ``generations``: int64 [n] each."""
        self._slots[rows], self._generations[rows] = slots, generations

    def check_integrity(self) -> None:
        """Raise ``AssertionError`` if a record is in a row where :meth:`find` would not look for it."""
        used = np.flatnonzero(self._slots >= 0)
        assert (self._slots[used] % max(len(self._slots), 1) == used).all(), "a record lies in another slot's row"


class CudaIndexer:
    """An :class:`.protocol.Indexer` in this process, with its own thread and CUDA stream.

    It gives the same answers as :class:`.scorer.LocalIndexer`. Its stream does not synchronise with other streams, and
    waiting for the GPU releases the GIL.

    Args:
        device: a GPU, or the CPU, where the same steps run in PyTorch.
        device_bytes: most GPU memory for cached records; all other records are read from the arena.
        register: makes the arena readable for the GPU until :meth:`close`.
        lookahead: the trained indexer, whose :attr:`.lookahead.LookaheadScorer.own` is ``spec``.
        graph_chunks: predictions over at most this many chunks are captured as CUDA graphs now, if
            :mod:`.static_prediction` supports the records; 0: none.

    Raises ValueError if the arena's records are of another kind than ``spec``.
    """

    def __init__(
        self,
        spec: IndexSpec,
        arena: ArenaIndexView,
        device: torch.device,
        device_bytes: int,
        register: Callable[[Tensor], Registration],
        lookahead: LookaheadScorer | None = None,
        *,
        graph_chunks: int = 0,
    ) -> None:
        check_kind(spec, arena)
        self._own = spec
        self._lookahead = None if lookahead is None else lookahead.to(device)
        self._spec = spec = spec if lookahead is None else lookahead.spec
        self._arena = arena
        self._device = device
        # the kernel reads one KV head's keys for all its queries, so queries are grouped by KV head
        self._query_rows = np.array([row for rows in spec.queries_of_kv for row in rows], dtype=np.int64)
        self._given_rows = torch.from_numpy(self._query_rows.argsort()).to(device)
        starts = [0, *accumulate(len(rows) for rows in spec.queries_of_kv)]
        self._query_starts = torch.tensor(starts, dtype=torch.int32, device=device)
        self._cache = RecordCache(min(device_bytes // spec.nbytes, len(arena.index)), spec.nbytes, device)
        self._static: StaticPredictions | None = None
        self._stream: torch.cuda.Stream | None = None
        self._done: torch.cuda.Event | None = None
        self._registered: Registration | None = None
        if device.type == "cuda":
            # takes precedence over decode steps: predictions are short, and the engine waits for them
            self._stream = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
            self._done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            self._registered = register(arena.index)
            # tensors created on the current stream are used on the indexer's stream
            torch.cuda.current_stream(device).synchronize()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="forecache-indexer")
        try:
            self._pool.submit(self._warm_up, graph_chunks).result()
        except BaseException:
            self.close()
            raise

    def predict(self, request: PredictRequest) -> Future[Prediction]:
        return self._pool.submit(self._predict, request)

    def close(self) -> None:
        """Finish the running prediction, cancel waiting ones, and unregister the arena."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        if self._static is not None:
            self._static.close()
        if self._registered is not None:
            self._registered.close()
            self._registered = None

    def check_integrity(self) -> None:
        """Raise ``AssertionError`` if the cache is inconsistent. Not to be called during a prediction."""
        self._cache.check_integrity()

    def _predict(self, request: PredictRequest) -> Prediction:
        slots, generations = request.index_slots, request.generations
        expected = (len(self._spec.query_heads), self._spec.head_dim)
        # queries for entries cover several steps; entry_logits checks their shape
        if self._spec.kind != "entries" and request.queries.shape != expected:
            raise ValueError(f"queries have shape {request.queries.shape}, not {expected}")
        check_state(request, self._lookahead)
        asked, local = where_records_are(request)
        chunks = asked[slots[asked] < len(self._arena.index)]
        chunks = chunks[unchanged(self._arena, request, chunks)]
        rows = self._cache.find(slots[chunks], generations[chunks])
        known, new = chunks[rows >= 0], chunks[rows < 0]
        copy_rows = self._cache.claim(slots[new])
        places = Places(np.concatenate([known, new, local]), rows[rows >= 0], slots[new], copy_rows)
        read = columns = places.chunks
        with self._in_stream():
            if self._static is not None and self._static.takes(len(slots), len(local)):
                found, lse = self._static.run(request, places)
            else:
                columns = np.arange(len(read))
                lse, local_lse = self._read(request, places)
                found = self._score(request, read, lse, local_lse)
            # check after reading: slots may have been reused meanwhile
            sound = np.ones(len(read), dtype=np.bool_)
            sound[: len(known)] = unchanged(
                self._arena, request, known
            )  # their checksums were verified when they were cached
            sound[len(known) : len(chunks)] = verified(self._arena, request, new)
            kept = sound[len(known) : len(chunks)] & (copy_rows >= 0)
            self._cache.keep(copy_rows[kept], slots[new[kept]], generations[new[kept]])
            if not sound.all():
                # one damaged record would spoil the softmax over all records
                read = read[sound]
                of_sound, local_lse = self._upload(columns[sound], request.local_lse)
                found = self._score(request, read, lse[:, of_sound], local_lse)
        return prediction(self._own, request, read, found)

    def _score(
        self, request: PredictRequest, read: npt.NDArray[np.int64], lse: Tensor, local_lse: Tensor
    ) -> npt.NDArray[np.float32]:
        """Result of :func:`.scorer.score`, float32 [2, chunks], from the log-sum-exps of the chunks ``read``."""
        (chunks,) = self._upload(read)
        return self._to_host(score(self._own, self._lookahead, [Read(request, chunks, lse, local_lse)])[0])

    def _read(self, request: PredictRequest, places: Places) -> tuple[Tensor, Tensor]:
        """Log-sum-exps, float32 [query heads, chunks], over the records at ``places``, and the request's
        ``local_lse`` on the device."""
        if self._spec.kind == "entries":
            return self._read_entries(request, places)
        queries = request.queries[self._query_rows] * np.float32(self._spec.scale)
        if self._spec.kind == "bounds":
            # a negative component of q multiplies the minimum, a positive one the maximum
            queries = np.concatenate([np.minimum(queries, 0), np.maximum(queries, 0)], 1)
        in_cache, in_arena, to_cache, numbers, on_device, local_lse, records = self._upload(
            places.cached,
            places.slots,
            places.copy_rows,
            np.arange(len(request.local_records)),
            queries,
            request.local_lse,
            request.local_records,
        )

        def lse(table: Tensor, at: Tensor, copies: Tensor | None = None) -> Tensor:
            return ops.score_chunks(
                table,
                at,
                on_device,
                self._query_starts,
                chunk_tokens=1 if self._spec.kind == "bounds" else self._spec.chunk_tokens,
                dtype=self._spec.dtype,
                copies=copies,
                copy_slots=None if copies is None else to_cache,
            )

        cached = self._cache.records
        # all cached rows are read before any row is written
        parts = [lse(cached, in_cache), lse(self._arena.index, in_arena, cached if len(cached) else None)]
        return torch.cat([*parts, lse(records, numbers)], 1)[self._given_rows], local_lse

    def _read_entries(self, request: PredictRequest, places: Places) -> tuple[Tensor, Tensor]:
        """:meth:`_read` for kind "entries", in PyTorch: logits, float32 [entries of a chunk, chunks]."""
        if request.weights is None:
            raise ValueError("a request for index keys of kind 'entries' lacks the weights of its queries")
        kept = places.copy_rows >= 0
        in_cache, to_cache, from_new, queries, weights, local_lse, records = self._upload(
            places.cached, places.copy_rows[kept], np.flatnonzero(kept), request.queries, request.weights,
            request.local_lse, request.local_records,
        )  # fmt: skip
        parts = [entry_logits(self._spec, self._cache.records, queries, weights, in_cache)]
        new = self._arena.index[torch.from_numpy(places.slots)].to(self._device)
        self._cache.records[to_cache] = new[from_new]
        parts += [entry_logits(self._spec, table, queries, weights) for table in (new, records)]
        return torch.cat(parts, 1), local_lse

    def _upload(self, *arrays: npt.NDArray[Any]) -> list[Tensor]:
        """Copy ``arrays`` to the device, in one transfer."""
        ends = accumulate(-(-array.nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES for array in arrays)
        places = list(pairwise([0, *ends]))
        packed = torch.empty(places[-1][1], dtype=torch.uint8, pin_memory=self._stream is not None)
        for array, (start, _) in zip(arrays, places, strict=True):
            packed.numpy()[start : start + array.nbytes] = array.reshape(-1).view(np.uint8)
        moved = packed.to(self._device, non_blocking=True)
        return [
            moved[start : start + array.nbytes].view(getattr(torch, array.dtype.name)).view(array.shape)
            for array, (start, _) in zip(arrays, places, strict=True)
        ]

    def _to_host(self, found: Tensor) -> npt.NDArray[np.float32]:
        """Wait for ``found``, asleep, and return it on the host."""
        host = found.to("cpu", non_blocking=True)
        if self._done is not None:
            self._done.record(self._stream)
            self._done.synchronize()
        array: npt.NDArray[np.float32] = host.numpy()
        return array

    def _in_stream(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _warm_up(self, graph_chunks: int) -> None:
        """Compile and load kernels now instead of during decode steps, with a dummy request."""
        heads, chunk_tokens = len(self._spec.query_heads), self._spec.chunk_tokens
        state = None
        if self._lookahead is not None:
            manifest = self._lookahead.manifest
            hidden = np.zeros((len(manifest.target_layers), manifest.hidden_size), dtype=np.float16)
            state = StepState(3 * chunk_tokens - 1, self._lookahead.steps, hidden)
        request = PredictRequest(
            sequence_id="",
            arena_path="",
            index_slots=np.array([0, 0, -1]),
            generations=np.zeros(3, dtype=np.int64),
            queries=np.zeros((heads, self._spec.head_dim), dtype=np.float32),
            local_lse=np.zeros(heads, dtype=np.float32),
            local_records=np.zeros((1, self._spec.nbytes), dtype=np.uint8),
            state=state,
            weights=np.zeros(heads, dtype=np.float32) if self._spec.kind == "entries" else None,
        )
        first = np.zeros(1, dtype=np.int64)
        rows = first[: len(self._cache.records)]
        read = np.arange(len(rows) + 2)
        with self._in_stream():
            lse, local_lse = self._read(request, Places(read, rows, first, rows if len(rows) else first - 1))
            self._score(request, read, lse, local_lse)
            (columns,) = self._upload(first)
            self._score(request, read[:1], lse[:, columns], local_lse)
            if graph_chunks and StaticPredictions.serves(self._spec):
                self._static = StaticPredictions(
                    self._own,
                    self._lookahead,
                    self._cache.records,
                    self._arena.index,
                    self._query_rows,
                    self._query_starts,
                    graph_chunks,
                    self._stream,
                )
