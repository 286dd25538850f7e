"""Predictions with static buffers: on a GPU one launch of a CUDA graph instead of about a hundred launches.

The kernels read from device memory where records are, how many there are, and which chunk each belongs to; columns past
the last chunk are padding. So one graph serves all sequences in a range of lengths. :mod:`.cuda_scorer` decides which
records to read and calls this module from one thread, on one stream.
"""

from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from forecache.indexer.records.index_spec import IndexSpec
from forecache.indexer.records.scores import scores_and_events
from forecache.indexer.serving.lookahead import LookaheadScorer
from forecache.indexer.serving.protocol import PredictRequest
from forecache.kernels.chunks import ops
from forecache.kernels.common.columns import Columns, fits_columns

CHUNK_BUCKETS = (128, 256, 512, 1024, 1536, 2048, 3072, 4096, 6144, 8192)
"""Padded numbers of chunks, one CUDA graph each; closer together where padding costs more."""
LOCAL_RECORDS = 64
"""Most records in a request that the buffers hold. More are rare, and launches are then a small part of the time."""
WARM_UPS = 2
"""Eager runs before a capture, which must not contain lazy initialisation (cuBLAS, cuDNN, Triton)."""
ALIGNMENT_BYTES = 64
"""Arrays of a packed buffer start at multiples of this."""

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Places:
    """Where the records of one request are: int64 [n] each.

    ``cached``: rows of the cache; ``slots``: slots of the arena, whose records are copied to rows ``copy_rows`` of the
    cache (-1: not copied). The request's own records follow in their order. ``chunks``: the chunk of each record, those
    of ``cached`` first, then of ``slots``, then of the request.
    """

    chunks: Ints
    cached: Ints
    slots: Ints
    copy_rows: Ints


class StaticPredictions:
    """Scores the chunks of one request at a time, as :func:`.scorer.score` does, for up to ``max_chunks`` chunks.

    ``own``, ``lookahead``: as in :class:`.cuda_scorer.CudaIndexer`; ``cache``, ``arena``: tables of records.
    ``query_rows`` and ``query_starts`` give the order of the kernel's queries. With ``stream`` the constructor captures
    CUDA graphs on that stream; no other thread may capture meanwhile. Without it every prediction runs eagerly.
    """

    def __init__(
        self,
        own: IndexSpec,
        lookahead: LookaheadScorer | None,
        cache: Tensor,
        arena: Tensor,
        query_rows: Ints,
        query_starts: Tensor,
        max_chunks: int,
        stream: torch.cuda.Stream | None,
    ) -> None:
        self._own, self._lookahead = own, lookahead
        self._spec = spec = own if lookahead is None else lookahead.spec
        self._cache, self._arena = cache, arena
        self._query_rows, self._query_starts = query_rows, query_starts
        device = query_starts.device
        self._given_rows = torch.from_numpy(query_rows.argsort()).to(device)
        self._stream = stream
        # busy waiting: waking up by an interrupt would take as long as the prediction
        self._done = None if stream is None else torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._records = _Packed({"records": ((LOCAL_RECORDS, spec.nbytes), torch.uint8)}, device)
        enough = next((size for size in CHUNK_BUCKETS if size >= max_chunks), CHUNK_BUCKETS[-1])
        self._buckets = [size for size in CHUNK_BUCKETS if size <= enough]
        self._inputs = {size: _Packed(self._fields(size), device) for size in self._buckets}
        self._found = torch.zeros(2 * self._buckets[-1], pin_memory=stream is not None)
        self._graphs: dict[int, _Graph] = {}
        if stream is not None:
            self._capture(stream)

    @staticmethod
    def serves(spec: IndexSpec) -> bool:
        """Whether records of this kind are supported."""
        return spec.kind == "tokens" and fits_columns(spec.chunk_tokens, spec.head_dim)

    def takes(self, chunks: int, local_records: int) -> bool:
        """Whether a request of that size fits the buffers."""
        return 0 < chunks <= self._buckets[-1] and local_records <= LOCAL_RECORDS

    def close(self) -> None:
        """Free the graphs and their memory. The stream must be idle."""
        self._graphs.clear()

    @torch.inference_mode()
    def run(self, request: PredictRequest, places: Places) -> tuple[npt.NDArray[np.float32], Tensor]:
        """Scores and event mass, float32 [2, chunks] on the host, and log-sum-exps, float32 [query heads, padded
        chunks] on the device, which the next run overwrites.

        Returns when the device is done. Chunks without a record score as in :func:`.scorer.score`.
        """
        count = len(request.index_slots)
        size = next(size for size in self._buckets if size >= count)
        self._fill(self._inputs[size], request, places)
        if len(request.local_records):
            self._records.host["records"][: len(request.local_records)] = request.local_records
            self._records.upload(len(request.local_records) * self._spec.nbytes)
        graph = self._graphs.get(size)
        if graph is None:
            lse = self._answer(size)
        else:
            graph.graph.replay()
            lse = graph.lse
        if self._done is not None:
            self._done.record(self._stream)
            self._done.synchronize()
        answer: npt.NDArray[np.float32] = self._found_of(size).numpy()[:, :count].copy()
        if len(places.chunks) < count:
            unread = np.ones(count, dtype=np.bool_)
            unread[places.chunks] = False
            answer[0, unread] = 0.0 if self._lookahead is None else answer[0].min()
            answer[1, unread] = 0.0
        return answer, lse

    def _fields(self, size: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shapes and dtypes of the inputs of a prediction over ``size`` chunks."""
        rows = len(self._spec.query_heads)
        fields = {
            "spans": ((3, 2), torch.int64),
            "places": ((size,), torch.int64),
            "copy_rows": ((size,), torch.int64),
            "columns": ((size,), torch.int64),
            "queries": ((rows, self._spec.head_dim), torch.float32),
            "local_lse": ((rows,), torch.float32),
        }
        if self._lookahead is not None:
            manifest = self._lookahead.manifest
            fields |= {
                "hidden": ((len(manifest.target_layers), manifest.hidden_size), torch.float16),
                "seen": ((self._lookahead.rows,), torch.int64),
                "complete": ((1,), torch.int64),
                "tail": ((1,), torch.float32),
            }
        return fields

    def _fill(self, inputs: "_Packed", request: PredictRequest, places: Places) -> None:
        host, cached, read = inputs.host, len(places.cached), len(places.chunks)
        stored = cached + len(places.slots)
        host["spans"][:] = ((0, cached), (cached, stored), (stored, read))
        host["columns"][:read] = places.chunks
        host["places"][:cached] = places.cached
        host["places"][cached:stored] = places.slots
        host["places"][stored:read] = np.arange(read - stored)
        host["copy_rows"][cached:stored] = places.copy_rows
        np.multiply(request.queries[self._query_rows], np.float32(self._spec.scale), out=host["queries"])
        host["local_lse"][:] = request.local_lse
        if self._lookahead is not None and request.state is not None:
            position, count = request.state.position, len(request.index_slots)
            host["hidden"][:] = request.state.hidden
            host["seen"][:] = self._lookahead.seen_chunks(position, request.state.steps)
            host["complete"][:] = count
            host["tail"][:] = (position + 1 - count * self._spec.chunk_tokens) / self._spec.chunk_tokens

    def _found_of(self, size: int) -> Tensor:
        """Host buffer for scores and event mass of ``size`` chunks: float32 [2, size]."""
        return self._found[: 2 * size].view(2, size)

    def _answer(self, size: int) -> Tensor:
        """Copy the inputs to the device, score, and copy the result back; returns the log-sum-exps. Does not
        synchronise, so it can be captured."""
        self._inputs[size].upload()
        lse, found = self._score(size)
        self._found_of(size).copy_(found, non_blocking=True)
        return lse

    def _score(self, size: int) -> tuple[Tensor, Tensor]:
        """Log-sum-exps, float32 [query heads, size], and scores and event mass, float32 [2, size]."""
        given = self._inputs[size].device
        lse = given["queries"].new_full((len(self._spec.query_heads), size), -torch.inf)
        kept = self._cache if len(self._cache) else None
        sources = [(self._arena, kept), (self._records.device["records"], None)]
        # all cached rows are read before any row is written
        for (table, copies), span in zip([(self._cache, None), *sources], given["spans"].unbind(0), strict=True):
            if len(table):
                ops.score_chunks(
                    table,
                    given["places"],
                    given["queries"],
                    self._query_starts,
                    chunk_tokens=self._spec.chunk_tokens,
                    dtype=self._spec.dtype,
                    copies=copies,
                    copy_slots=None if copies is None else given["copy_rows"],
                    into=Columns(lse, given["columns"], span),
                )
        lse = lse.index_select(0, self._given_rows)
        own = slice(len(lse) - len(self._own.query_heads), None)
        found = scores_and_events(self._own, lse[own], given["local_lse"][own])
        if self._lookahead is not None:
            state = (given[name] for name in ("hidden", "seen", "complete", "tail"))
            found[0] = self._lookahead.padded_scores(lse, given["local_lse"], *state)
        return lse, found

    @torch.inference_mode()
    def _capture(self, stream: torch.cuda.Stream) -> None:
        memory = torch.cuda.graph_pool_handle()
        # largest first, so that the smaller graphs fit into its memory; graphs run one at a time and can share it
        for size in reversed(self._buckets):
            for _ in range(WARM_UPS):
                self._answer(size)
            stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            # thread_local: other threads may use the GPU during the capture
            with torch.cuda.graph(graph, pool=memory, stream=stream, capture_error_mode="thread_local"):
                lse = self._answer(size)
            self._graphs[size] = _Graph(graph, lse)


@dataclass(frozen=True)
class _Graph:
    """A captured prediction. The next replay of any graph overwrites ``lse``."""

    graph: torch.cuda.CUDAGraph
    lse: Tensor


class _Packed:
    """Named arrays in one pinned host buffer, and a device buffer with the same layout: one copy moves them all.

    Fill the host buffer again only when the copy is done.
    """

    def __init__(self, fields: dict[str, tuple[tuple[int, ...], torch.dtype]], device: torch.device) -> None:
        sizes = [int(np.prod(shape)) * dtype.itemsize for shape, dtype in fields.values()]
        starts = [0, *accumulate(-(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES for size in sizes)]
        self._here = torch.zeros(starts[-1], dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._there = torch.zeros(starts[-1], dtype=torch.uint8, device=device)
        places = [slice(start, start + size) for start, size in zip(starts[:-1], sizes, strict=True)]
        views = {
            name: [whole[place].view(dtype).view(shape) for whole in (self._here, self._there)]
            for (name, (shape, dtype)), place in zip(fields.items(), places, strict=True)
        }
        self.host = {name: here.numpy() for name, (here, _) in views.items()}
        self.device = {name: there for name, (_, there) in views.items()}

    def upload(self, nbytes: int | None = None) -> None:
        """Enqueue the copy of the first ``nbytes`` bytes, by default of all."""
        self._there[:nbytes].copy_(self._here[:nbytes], non_blocking=True)
