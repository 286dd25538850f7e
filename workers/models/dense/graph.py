"""Decode steps of fixed shapes for models of plain K/V; see :mod:`forecache.workers.models.step.graphs`.

A step reads tokens, places, block table and lengths, and leaves logits, greedy tokens and captured queries. Rows beyond
the batch are padding: they attend to nothing and are stored nowhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from forecache.workers.core.step_plan import DecodeRow, DecodeRows
from forecache.workers.models.dense.attention import QueryCapture, StepBatch
from forecache.workers.models.dense.streamed_past import Store
from forecache.workers.models.step.graphs import (
    BlockTables,
    HostInputs,
    OutputBuffers,
    StepGraphs,
    batch_buckets,
    input_tokens,
)
from forecache.workers.models.step.hidden_history import HiddenHistory

TOKEN, SOURCE, POSITION, SLOT, OFFSET, CONTEXT_LEN, LINE = range(7)
"""Rows of the input buffer."""


@dataclass(frozen=True)
class Replayed:
    """Buffers of the last replay: ``logits`` float32 [rows, vocab], ``best`` float32 [rows] as in
    :func:`.sampler.sample`, by layer ``queries`` [rows, heads, head_dim], and ``non_finite`` uint8 [rows] as in
    :class:`.attention.StepBatch`."""

    logits: Tensor
    best: Tensor
    queries: dict[int, Tensor]
    non_finite: Tensor


class DecodeGraphs(StepGraphs[Replayed]):
    """``model``'s decode steps, for batches up to ``max_batch_size`` and tables up to ``max_chunks`` wide.

    ``heads``: layer → the query heads whose queries are kept for the indexer. ``last_tokens``: int64 [at least the
    largest bucket], the tokens of the step before. ``histories``: where hidden states go for a trained indexer.
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
        outputs: OutputBuffers,
        histories: HiddenHistory | None = None,
    ) -> None:
        super().__init__(batch_buckets(max_batch_size), LINE + 1, [max_chunks], pool.kv.device)
        self.max_chunks = max_chunks
        self._model = model
        self._pool = pool
        self._heads = heads
        self._last_tokens = last_tokens
        self._outputs = outputs
        self._histories = histories
        self._inputs[SLOT] = -1
        self._block_tables = BlockTables(self._tables[0])
        if self._captures:
            for bucket in reversed(self._buckets):
                self._capture(bucket)

    def takes(self, rows: Sequence[DecodeRow]) -> bool:
        """Whether a graph is large enough for a step of ``rows`` alone."""
        return 0 < len(rows) <= self._buckets[-1] and all(len(row.table) <= self.max_chunks for row in rows)

    def replay(self, rows: Sequence[DecodeRow]) -> Replayed:
        """Enqueue a step of ``rows``; what it leaves stands until the next replay."""
        count = len(rows)
        bucket = self._bucket(count)
        host = self._next_host()
        self._fill(host, rows, bucket)
        self._block_tables.update(host.tables[0], [(row.version, row.table) for row in rows])
        self._inputs.copy_(host.inputs, non_blocking=True)
        output = self._run(bucket)
        queries = {layer: q[:count] for layer, q in output.queries.items()}
        return Replayed(output.logits[:count], output.best[:count], queries, output.non_finite[:count])

    def _fill(self, host: HostInputs, rows: Sequence[DecodeRow], bucket: int) -> None:
        values = [
            (row.token, row.source, row.position, row.slot, row.offset, row.context_len, row.line) for row in rows
        ]
        inputs = host.inputs.numpy()
        inputs[:, : len(rows)] = list(zip(*values, strict=True))
        padding = inputs[:, len(rows) : bucket]
        padding[:] = 0
        padding[SOURCE] = padding[SLOT] = -1

    def _forward(self, bucket: int) -> Replayed:
        inputs, histories = self._inputs[:, :bucket], self._histories
        everyone = torch.arange(bucket, device=inputs.device)
        capture = QueryCapture(everyone, self._heads)
        non_finite = torch.zeros(bucket, dtype=torch.uint8, device=inputs.device)
        batch = StepBatch(
            token_ids=input_tokens(inputs[TOKEN], inputs[SOURCE], self._last_tokens),
            positions=inputs[POSITION],
            slots=inputs[SLOT],
            offsets=inputs[OFFSET],
            logits_rows=everyone,
            pool=self._pool,
            decode=DecodeRows(self._tables[0][:bucket], inputs[CONTEXT_LEN].to(torch.int32)),
            capture=capture,
            hidden=None if histories is None else histories.fixed_rows(inputs[LINE], inputs[POSITION]),
            non_finite=non_finite,
        )
        output = self._model(
            input_ids=batch.token_ids.unsqueeze(0),
            position_ids=batch.positions.unsqueeze(0),
            use_cache=False,
            forecache=batch,
        )
        kept = self._outputs
        logits = kept.keep("logits", output.logits[0].float())
        best, tokens = logits.max(dim=-1)
        self._last_tokens[:bucket] = tokens
        return Replayed(
            logits,
            kept.keep("best", best),
            kept.keep_all("queries", capture.queries),
            kept.keep("non_finite", non_finite),
        )
