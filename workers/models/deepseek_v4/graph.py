"""Decode steps of a DeepSeek-V4 model as CUDA graphs; `dense/graph.py` has those of other decoders.

A graph has fixed shapes, so every row writes its token's entry at every step, not only at the step that completes the
entry: an entry is not read before it is complete. Padding rows repeat the first row, and write the same values. Drawing
tokens from the logits is not part of the graph.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from forecache.workers.models.deepseek_v4.layout import FixedRow
from forecache.workers.models.deepseek_v4.state import PAGE_ENTRIES
from forecache.workers.models.deepseek_v4.step import Places, V4Batch, V4Rows
from forecache.workers.models.step.graphs import HostInputs, StepGraphs, input_tokens
from forecache.workers.models.step.hidden_history import HiddenHistory

logger = logging.getLogger(__name__)

TOKEN, SOURCE, POSITION, LINE, SLOT, PAGE, ENTRIES, HISTORY = range(8)
"""Rows of the input buffer."""


class FixedSteps(StepGraphs[tuple[Tensor, Tensor]]):
    """Decode steps of ``model``, tables up to ``max_chunks`` wide and contexts up to ``max_tokens``: on CUDA as graphs,
    elsewhere eagerly over the same fixed shapes. ``buckets``: the numbers of rows that there are steps for, ascending.

    ``empty``: a step without rows, which says where pool and states lie. ``last_tokens``: int64 [at least the largest
    batch], the tokens of the step before. ``histories``: where hidden states are kept for the indexer.
    """

    capture_error_mode = "thread_local"  # other threads copy chunks meanwhile

    def __init__(
        self,
        model: Any,
        empty: V4Batch,
        chunk_tokens: int,
        histories: HiddenHistory,
        last_tokens: Tensor,
        *,
        buckets: Sequence[int],
        max_chunks: int,
        max_tokens: int,
    ) -> None:
        shape = empty.states.shape
        self._max_chunks = max_chunks
        self._max_pages = -(-max_tokens // (shape.hca_rate * PAGE_ENTRIES)) + 1
        super().__init__(buckets, HISTORY + 1, [max_chunks, self._max_pages], last_tokens.device)
        self._model, self._empty, self._histories = model, empty, histories
        self._chunk_tokens = chunk_tokens
        self._last_tokens = last_tokens
        self._pages = empty.states.pages
        """Where the HCA entries lay when the graphs were captured."""
        self._inputs[SOURCE] = -1
        self.non_finite = torch.zeros(buckets[-1], dtype=torch.uint8, device=last_tokens.device)
        """Of the last run, as in :class:`.step.V4Batch`."""
        self._refused = False
        if self._captures:
            # no sequence has a line, a slot or a page yet, so nothing reads what these steps write
            for bucket in reversed(self._buckets):
                self._ready(bucket)

    @property
    def count(self) -> int:
        """The number of captured graphs."""
        return len(self._graphs)

    def run(self, rows: Sequence[FixedRow]) -> Tensor | None:
        """Enqueue a step of ``rows``; its logits, float32 [rows, vocab], until the next. None: it does not fit, or
        can't be captured."""
        if not 0 < len(rows) <= self._buckets[-1] or self._refused:
            return None
        if any(len(row.table) > self._max_chunks or len(row.pages) > self._max_pages for row in rows):
            return None
        bucket, host = self._bucket(len(rows)), self._next_host()
        self._fill(host, rows, bucket)
        self._inputs.copy_(host.inputs, non_blocking=True)
        for table, host_table in zip(self._tables, host.tables, strict=True):
            table[:bucket].copy_(host_table[:bucket], non_blocking=True)
        if self._captures and not self._ready(bucket):
            return None
        logits, self.non_finite = self._run(bucket)
        return logits[: len(rows)]

    def _fill(self, host: HostInputs, rows: Sequence[FixedRow], bucket: int) -> None:
        """Copy ``rows`` into the inputs; padding rows of ``bucket`` repeat the first."""
        rows = [*rows, *[rows[0]] * (bucket - len(rows))]
        values = [
            (row.token, row.source, row.position, row.line, row.slot, row.page, row.entries, row.history)
            for row in rows
        ]
        host.inputs.numpy()[:, :bucket] = list(zip(*values, strict=True))
        table, hca_table = (one.numpy() for one in host.tables)
        for number, row in enumerate(rows):
            table[number, : len(row.table)] = row.table
            hca_table[number, : len(row.pages)] = row.pages

    def _ready(self, bucket: int) -> bool:
        """Capture the graph for ``bucket``, unless it exists and its pages have not moved; returns whether it exists.

        If a capture fails, this is logged, and no further one is tried. A capture also computes the current inputs.
        """
        pages = self._empty.states.pages
        if self._pages is not pages:
            self._graphs.clear()  # they would read the old pages, and all move at once
            self._pages = pages
        if bucket in self._graphs:
            return True
        try:
            self._capture(bucket)
        except RuntimeError as error:
            self._refused = True
            self._graphs.clear()
            torch.cuda.synchronize(self._inputs.device)
            logger.warning("decode steps of DeepSeek-V4 run eagerly, which is slow; they can't be captured: %s", error)
        return not self._refused

    def _forward(self, bucket: int) -> tuple[Tensor, Tensor]:
        """Logits, and what of the rows is not finite, as in :class:`.step.V4Batch`."""
        inputs = self._inputs[:, :bucket]
        histories = self._histories
        batch = replace(
            self._empty,
            token_ids=input_tokens(inputs[TOKEN], inputs[SOURCE], self._last_tokens),
            positions=inputs[POSITION],
            logits_rows=torch.arange(bucket, device=inputs.device),
            rows=self._rows(inputs, bucket),
            hidden=histories.fixed_rows(inputs[HISTORY], inputs[POSITION]),
            non_finite=torch.zeros(bucket, dtype=torch.uint8, device=inputs.device),
        )
        return run_model(self._model, batch), batch.non_finite

    def _rows(self, inputs: Tensor, bucket: int) -> V4Rows:
        shape, positions = self._empty.states.shape, inputs[POSITION]
        everyone = torch.arange(bucket, device=inputs.device)

        def filling(rate: int) -> Places:
            number = positions // rate
            places = positions % self._chunk_tokens // rate
            closing = (positions + 1) % rate == 0
            return Places(everyone, number * rate, inputs[SLOT], places, inputs[PAGE], number % PAGE_ENTRIES, closing)

        return V4Rows(
            lines=inputs[LINE],
            positions=positions,
            window_lens=(positions + 1).clamp(max=shape.window).to(torch.int32),
            table=self._tables[0][:bucket],
            lens=inputs[ENTRIES].to(torch.int32),
            csa=filling(shape.csa_rate),
            hca=filling(shape.hca_rate),
            hca_table=self._tables[1][:bucket],
            hca_lens=((positions + 1) // shape.hca_rate).to(torch.int32),
        )


def run_model(model: Any, batch: V4Batch) -> Tensor:
    """Logits of the step ``batch``, float32 [logits rows, vocab]."""
    output = model(
        input_ids=batch.token_ids.unsqueeze(0),
        position_ids=batch.positions.unsqueeze(0),
        attention_mask={"none": None},  # a dict is taken as it is: no mask is built
        use_cache=False,
        logits_to_keep=batch.logits_rows,
        forecache=batch,
    )
    logits: Tensor = output.logits[0].float()
    return logits
