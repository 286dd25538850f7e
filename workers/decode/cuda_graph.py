"""Decode steps as CUDA graphs: one launch a step instead of some hundreds.

Every decision stays outside: a graph reads its tokens, block table and lengths from buffers that are filled before each
replay, and leaves logits and captured queries in buffers of its own. Rows beyond the batch are padding: they attend to
nothing and are stored nowhere.
"""

from dataclasses import dataclass
from typing import Any

import torch

from forecache.workers.decode.attention import DecodeRows, QueryCapture, StepBatch

WARM_UPS = 2
"""Eager runs before a capture: lazy initialisation (cuBLAS handles, Triton compilation) must be over by then."""


@dataclass(frozen=True)
class _Graph:
    """``logits`` [bucket, vocab] and ``queries`` (layer → [bucket, heads, head_dim]) hold the last replay's output."""

    graph: torch.cuda.CUDAGraph
    logits: torch.Tensor
    queries: dict[int, torch.Tensor]


def batch_buckets(max_batch_size: int) -> list[int]:
    """Batch sizes to capture: 1, 2, 4, 8, then every 8, up to ``max_batch_size`` rounded up."""
    buckets = [size for size in (1, 2, 4) if size < max_batch_size]
    return [*buckets, *range(8, max_batch_size + 8, 8)]


class DecodeGraphs:
    """Graphs of ``model``'s decode step, for batches up to ``max_batch_size`` and tables up to ``max_chunks`` wide.

    ``heads``: layer → the query heads whose queries are kept for the indexer.
    """

    def __init__(
        self, model: Any, kv: torch.Tensor, heads: dict[int, torch.Tensor], *, max_batch_size: int, max_chunks: int
    ) -> None:
        self.max_chunks = max_chunks
        self._buckets = batch_buckets(max_batch_size)
        largest, device = self._buckets[-1], kv.device
        self._token_ids = torch.zeros(largest, dtype=torch.int64, device=device)
        self._positions = torch.zeros(largest, dtype=torch.int64, device=device)
        self._slots = torch.full((largest,), -1, dtype=torch.int64, device=device)
        self._offsets = torch.zeros(largest, dtype=torch.int64, device=device)
        self._block_table = torch.zeros(largest, max_chunks, dtype=torch.int32, device=device)
        self._context_lens = torch.zeros(largest, dtype=torch.int32, device=device)
        self._graphs: dict[int, _Graph] = {}
        memory = None
        # largest first: the smaller graphs then fit the memory it took
        for bucket in reversed(self._buckets):
            self._graphs[bucket] = self._capture(model, kv, heads, bucket, memory)
            memory = self._graphs[bucket].graph.pool()

    def takes(self, batch: StepBatch) -> bool:
        """Whether ``batch`` is a pure decode step that a graph is wide and long enough for."""
        if batch.streams or batch.decode is None:
            return False
        rows, width = batch.decode.block_table.shape
        return rows <= self._buckets[-1] and width <= self.max_chunks

    def replay(self, batch: StepBatch) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """Run ``batch``: logits [rows, vocab] and, by layer, queries [rows, heads, head_dim], until the next replay."""
        assert batch.decode is not None
        rows, width = batch.decode.block_table.shape
        bucket = next(size for size in self._buckets if size >= rows)
        self._token_ids[:rows] = batch.token_ids
        self._positions[:rows] = batch.positions
        self._slots[:bucket] = -1
        self._slots[:rows] = batch.slots
        self._offsets[:rows] = batch.offsets
        self._block_table[:rows, :width] = batch.decode.block_table
        self._context_lens[:bucket] = 0
        self._context_lens[:rows] = batch.decode.context_lens
        graph = self._graphs[bucket]
        graph.graph.replay()
        return graph.logits[:rows], {layer: queries[:rows] for layer, queries in graph.queries.items()}

    def _capture(
        self, model: Any, kv: torch.Tensor, heads: dict[int, torch.Tensor], bucket: int, memory: Any
    ) -> _Graph:
        stream = torch.cuda.Stream(kv.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(kv.device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self._forward(model, kv, heads, bucket)
        torch.cuda.current_stream(kv.device).wait_stream(stream)
        torch.cuda.synchronize(kv.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=memory):
            logits, queries = self._forward(model, kv, heads, bucket)
        return _Graph(graph, logits, queries)

    def _forward(
        self, model: Any, kv: torch.Tensor, heads: dict[int, torch.Tensor], bucket: int
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        capture = QueryCapture(torch.arange(bucket, device=kv.device), heads)
        batch = StepBatch(
            token_ids=self._token_ids[:bucket],
            positions=self._positions[:bucket],
            slots=self._slots[:bucket],
            offsets=self._offsets[:bucket],
            logits_rows=torch.arange(bucket, device=kv.device),
            kv=kv,
            decode=DecodeRows(self._block_table[:bucket], self._context_lens[:bucket]),
            streams=(),
            capture=capture,
            aborted=lambda: False,
        )
        output = model(
            input_ids=batch.token_ids.unsqueeze(0),
            position_ids=batch.positions.unsqueeze(0),
            use_cache=False,
            forecache=batch,
        )
        return output.logits[0].float(), capture.queries
