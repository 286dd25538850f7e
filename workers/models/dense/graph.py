"""Decode steps as CUDA graphs: one launch a step instead of some hundreds.

Every decision stays outside: a graph reads tokens, places, block table and lengths from buffers that are filled before
each replay, and leaves logits, greedy tokens and captured queries in buffers of its own. Rows beyond the batch are
padding: they attend to nothing and are stored nowhere. A row's token may be one that the step before drew: then it is
taken from where that step left it, and the host need not have seen it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from forecache.workers.core.step_plan import DecodeRow, DecodeRows
from forecache.workers.models.dense.attention import QueryCapture, StepBatch
from forecache.workers.models.dense.streamed_past import Store
from forecache.workers.models.step.graphs import WARM_UPS, batch_buckets
from forecache.workers.models.step.hidden_history import HiddenHistory, HiddenRows

TOKEN, SOURCE, POSITION, SLOT, OFFSET, CONTEXT_LEN, LINE = range(7)
"""Rows of the input buffer."""


@dataclass(frozen=True)
class Replayed:
    """Buffers of the last replay: ``logits`` float32 [rows, vocab], ``tokens`` int64 and ``best`` float32 [rows] as in
    :func:`.sampler.sample`, by layer ``queries`` [rows, heads, head_dim], and ``non_finite`` uint8 [rows] as in
    :class:`.attention.StepBatch`."""

    logits: Tensor
    tokens: Tensor
    best: Tensor
    queries: dict[int, Tensor]
    non_finite: Tensor


@dataclass(frozen=True)
class _Graph:
    graph: torch.cuda.CUDAGraph
    output: Replayed


class DecodeGraphs:
    """Graphs of ``model``'s decode step, for batches up to ``max_batch_size`` and tables up to ``max_chunks`` wide.

    ``heads``: layer → the query heads whose queries are kept for the indexer. ``last_tokens``: int64 [at least the
    largest bucket], the tokens of the step before. ``histories``: where hidden states go for a trained indexer.
    ``captured`` is called after each bucket.
    """

    def __init__(
        self,
        model: Any,
        pool: Store,
        heads: dict[int, Tensor],
        last_tokens: Tensor,
        *,
        max_batch_size: int,
        max_chunks: int,
        histories: HiddenHistory | None = None,
        captured: Callable[[int], None] = lambda _bucket: None,
    ) -> None:
        self.max_chunks = max_chunks
        self._buckets = batch_buckets(max_batch_size)
        self._pool = pool
        self._last_tokens = last_tokens
        self._histories = histories
        largest, device = self._buckets[-1], pool.kv.device
        # two host copies in turn: while one is on its way to the device, the next step fills the other
        self._host = [_HostInputs(largest, max_chunks) for _ in range(2)]
        self._turn = 0
        self._inputs = torch.zeros(LINE + 1, largest, dtype=torch.int64, device=device)
        self._inputs[SLOT] = -1
        self._table = torch.zeros(largest, max_chunks, dtype=torch.int32, device=device)
        self._versions: list[object] = [None] * largest
        self._graphs: dict[int, _Graph] = {}
        memory = None
        # largest first: the smaller graphs then fit the memory it took
        for bucket in reversed(self._buckets):
            self._graphs[bucket] = self._capture(model, heads, bucket, memory)
            memory = self._graphs[bucket].graph.pool()
            captured(bucket)

    def takes(self, rows: Sequence[DecodeRow]) -> bool:
        """Whether a graph is large enough for a step of ``rows`` alone."""
        return 0 < len(rows) <= self._buckets[-1] and all(len(row.table) <= self.max_chunks for row in rows)

    def replay(self, rows: Sequence[DecodeRow]) -> Replayed:
        """Enqueue a step of ``rows``; what it leaves stands until the next replay."""
        count = len(rows)
        bucket = next(size for size in self._buckets if size >= count)
        host, self._turn = self._host[self._turn], 1 - self._turn
        host.fill(rows, bucket)
        for index, row in enumerate(rows):
            if self._versions[index] != row.version:
                self._versions[index] = row.version
                width = host.set_table(index, row)
                self._table[index, :width].copy_(host.table[index, :width], non_blocking=True)
        self._inputs.copy_(host.inputs, non_blocking=True)
        graph = self._graphs[bucket]
        graph.graph.replay()
        output = graph.output
        queries = {layer: q[:count] for layer, q in output.queries.items()}
        rows_of = (output.logits[:count], output.tokens[:count], output.best[:count])
        return Replayed(*rows_of, queries, output.non_finite[:count])

    def _capture(self, model: Any, heads: dict[int, Tensor], bucket: int, memory: Any) -> _Graph:
        device = self._inputs.device
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self._forward(model, heads, bucket)
        torch.cuda.current_stream(device).wait_stream(stream)
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=memory):
            output = self._forward(model, heads, bucket)
        return _Graph(graph, output)

    def _forward(self, model: Any, heads: dict[int, Tensor], bucket: int) -> Replayed:
        inputs = self._inputs[:, :bucket]
        everyone = torch.arange(bucket, device=inputs.device)
        capture = QueryCapture(everyone, heads)
        source = inputs[SOURCE]
        drawn = self._last_tokens[source.clamp(min=0)]
        non_finite = torch.zeros(bucket, dtype=torch.uint8, device=inputs.device)
        batch = StepBatch(
            token_ids=torch.where(source < 0, inputs[TOKEN], drawn),
            positions=inputs[POSITION],
            slots=inputs[SLOT],
            offsets=inputs[OFFSET],
            logits_rows=everyone,
            pool=self._pool,
            decode=DecodeRows(self._table[:bucket], inputs[CONTEXT_LEN].to(torch.int32)),
            capture=capture,
            hidden=self._hidden_rows(inputs),
            non_finite=non_finite,
        )
        output = model(
            input_ids=batch.token_ids.unsqueeze(0),
            position_ids=batch.positions.unsqueeze(0),
            use_cache=False,
            forecache=batch,
        )
        logits = output.logits[0].float()
        best, tokens = logits.max(dim=-1)
        self._last_tokens[:bucket] = tokens
        return Replayed(logits, tokens, best, capture.queries, non_finite)

    def _hidden_rows(self, inputs: Tensor) -> HiddenRows | None:
        histories = self._histories
        if histories is None:
            return None
        # padding rows write to nobody's line
        places = inputs[POSITION] % histories.steps
        return HiddenRows(histories.ring, histories.layers, None, inputs[LINE], places)


class _HostInputs:
    """Page-locked host memory for one step's inputs, filled through numpy."""

    def __init__(self, rows: int, max_chunks: int) -> None:
        self.inputs = torch.zeros(LINE + 1, rows, dtype=torch.int64, pin_memory=True)
        self.table = torch.zeros(rows, max_chunks, dtype=torch.int32, pin_memory=True)
        self._inputs = self.inputs.numpy()
        self._table = self.table.numpy()

    def fill(self, rows: Sequence[DecodeRow], bucket: int) -> None:
        values = [
            (row.token, row.source, row.position, row.slot, row.offset, row.context_len, row.line) for row in rows
        ]
        self._inputs[:, : len(rows)] = list(zip(*values, strict=True))
        padding = self._inputs[:, len(rows) : bucket]
        padding[:] = 0
        padding[SOURCE] = padding[SLOT] = -1

    def set_table(self, index: int, row: DecodeRow) -> int:
        self._table[index, : len(row.table)] = row.table
        return len(row.table)
