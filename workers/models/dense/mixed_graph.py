"""Steps of decode rows and prompt tokens together, of fixed shapes; see :mod:`forecache.workers.models.step.graphs`.

A graph has a number of packed tokens, and room for the largest batch: decode rows come first, then the prompts' tokens,
then padding. Which rows are what, and which sequence a token belongs to, is read on the device. So one graph a token
count serves every mix of rows.

Two kinds of steps stay eager: those that read chunks outside the pool, and those whose attention takes so long that the
host is no burden and a cancelled request should end between two layers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from forecache.workers.core.step_plan import DecodeRow, DecodeRows
from forecache.workers.models.dense.attention import ProbeCapture, PromptRows, QueryCapture, StepBatch, run_model
from forecache.workers.models.dense.streamed_past import Store
from forecache.workers.models.step.graphs import BlockTables, OutputBuffers, StepGraphs, input_tokens, token_buckets
from forecache.workers.models.step.hidden_history import HiddenHistory

TOKEN, SOURCE, POSITION, SLOT, OFFSET, LINE, CONTEXT_LEN, PAST_LEN, START, LOGITS_ROW, PROBE_ROW = range(11)
"""Rows of the input buffer. The first six have a value for each packed token; ``CONTEXT_LEN``, ``PAST_LEN`` and
``LOGITS_ROW`` for each sequence; ``START`` one more; ``PROBE_ROW`` for each probed token."""

MAX_PROBED_TOKENS = 1024
"""Probed prompt tokens of one step."""

MAX_PROMPTS = 32
"""Prompts of one step. The attention kernel starts programs for so many in every layer, even if there are fewer."""

MAX_ATTENDED_PAIRS = 8192 * 131072
"""Pairs of a new token and a past one in a step: more take a second or longer, even on fast devices."""


@dataclass(frozen=True)
class PackedTokens:
    """Packed tokens of a step on the host, int64 [tokens] each. ``sources``: rows of the step before, for tokens that
    the host has not read; else -1."""

    tokens: npt.NDArray[np.int64]
    sources: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    slots: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int64]
    lines: npt.NDArray[np.int64]


@dataclass(frozen=True)
class PromptTable:
    """A prompt's past on the host: ``slots`` int32 [chunks] of ``past_len`` tokens in the pool; ``start``: its first
    packed token; ``stop``: behind its last; ``probed``: how many of its last tokens are probed."""

    slots: npt.NDArray[np.int32]
    past_len: int
    start: int
    stop: int
    probed: int


@dataclass(frozen=True)
class MixedOutput:
    """Buffers of the last replay: ``logits`` float32 [rows, vocab], ``best`` float32 [rows], by layer ``queries``
    [decode rows, heads, head_dim], ``non_finite`` uint8 [tokens], and what :class:`.attention.ProbeCapture` keeps of
    the probed tokens, by layer ``probe_queries`` [probed, heads, head_dim] and ``probe_lse`` float32 [probed, heads].
    """

    logits: Tensor
    best: Tensor
    queries: Mapping[int, Tensor]
    non_finite: Tensor
    probe_queries: Mapping[int, Tensor]
    probe_lse: Mapping[int, Tensor]


class MixedGraphs(StepGraphs[MixedOutput]):
    """``model``'s steps of at most ``max_tokens`` packed tokens of ``max_rows`` sequences.

    ``max_chunks``, ``max_prompt_chunks``: chunks that a decode row and a prompt read in the pool at most. ``heads``,
    ``last_tokens`` and ``histories`` as in :class:`.graph.DecodeGraphs`.
    """

    def __init__(
        self,
        model: Any,
        pool: Store,
        heads: dict[int, Tensor],
        last_tokens: Tensor,
        *,
        max_tokens: int,
        max_rows: int,
        max_chunks: int,
        max_prompt_chunks: int,
        outputs: OutputBuffers,
        histories: HiddenHistory | None = None,
    ) -> None:
        buckets = token_buckets(max(max_tokens, max_rows + 1))
        widths = [max_chunks, max_prompt_chunks]
        super().__init__(buckets, PROBE_ROW + 1, widths, pool.kv.device, table_rows=max_rows)
        self.max_rows = max_rows
        self.max_prompts = min(max_rows, MAX_PROMPTS)
        self.max_chunks = max_chunks
        self.max_prompt_chunks = max_prompt_chunks
        self._max_probed = min(MAX_PROBED_TOKENS, buckets[-1])
        self._model = model
        self._pool = pool
        self._heads = heads
        self._last_tokens = last_tokens
        self._outputs = outputs
        self._histories = histories
        self._inputs[SLOT] = self._inputs[SOURCE] = -1
        self._decode_tables = BlockTables(self._tables[0])
        if self._captures:
            for bucket in reversed(self._buckets):
                self._capture(bucket)

    def takes(self, rows: Sequence[DecodeRow], prompts: Sequence[PromptTable], logits_rows: int) -> bool:
        """Whether a graph is large enough for a step of ``rows`` and ``prompts`` with logits of so many tokens."""
        return (
            len(rows) + sum(one.stop - one.start for one in prompts) <= self._buckets[-1]
            and max(len(rows), logits_rows) <= self.max_rows
            and len(prompts) <= self.max_prompts
            and all(len(row.table) <= self.max_chunks for row in rows)
            and all(len(one.slots) <= self.max_prompt_chunks for one in prompts)
            and sum(one.probed for one in prompts) <= self._max_probed
            and sum((one.stop - one.start) * one.past_len for one in prompts) <= MAX_ATTENDED_PAIRS
        )

    def replay(
        self,
        packed: PackedTokens,
        rows: Sequence[DecodeRow],
        prompts: Sequence[PromptTable],
        logits_rows: Sequence[int],
    ) -> MixedOutput:
        """Enqueue a step; its output stands until the next replay."""
        count = len(packed.tokens)
        bucket, host = self._bucket(count), self._next_host()
        probed = [at for one in prompts for at in range(one.stop - one.probed, one.stop)]
        self._fill(host.inputs.numpy(), packed, rows, prompts, logits_rows, probed, bucket)
        self._decode_tables.update(host.tables[0], [(row.version, row.table) for row in rows])
        for index, one in enumerate(prompts):
            width = len(one.slots)
            host.tables[1].numpy()[index, :width] = one.slots
            self._tables[1][index, :width].copy_(host.tables[1][index, :width], non_blocking=True)
        self._inputs.copy_(host.inputs, non_blocking=True)
        output = self._run(bucket)
        return MixedOutput(
            output.logits[: len(logits_rows)],
            output.best[: len(logits_rows)],
            {layer: q[: len(rows)] for layer, q in output.queries.items()},
            output.non_finite[:count],
            {layer: q[: len(probed)] for layer, q in output.probe_queries.items()},
            {layer: lse[: len(probed)] for layer, lse in output.probe_lse.items()},
        )

    def _fill(
        self,
        inputs: npt.NDArray[np.int64],
        packed: PackedTokens,
        rows: Sequence[DecodeRow],
        prompts: Sequence[PromptTable],
        logits_rows: Sequence[int],
        probed: Sequence[int],
        bucket: int,
    ) -> None:
        count = len(packed.tokens)
        for field, values in (
            (TOKEN, packed.tokens),
            (SOURCE, packed.sources),
            (POSITION, packed.positions),
            (SLOT, packed.slots),
            (OFFSET, packed.offsets),
            (LINE, packed.lines),
        ):
            inputs[field, :count] = values
            inputs[field, count:bucket] = -1 if field in (SOURCE, SLOT) else 0
        # padding rows attend to nothing; padding sequences are empty and follow the last prompt
        inputs[CONTEXT_LEN, : self.max_rows] = 0
        inputs[CONTEXT_LEN, : len(rows)] = [row.context_len for row in rows]
        inputs[PAST_LEN, : self.max_prompts] = 0
        inputs[PAST_LEN, : len(prompts)] = [one.past_len for one in prompts]
        inputs[START, : len(prompts)] = [one.start for one in prompts]
        inputs[START, len(prompts) : self.max_prompts + 1] = prompts[-1].stop if prompts else count
        inputs[LOGITS_ROW, : self.max_rows] = 0
        inputs[LOGITS_ROW, : len(logits_rows)] = logits_rows
        inputs[PROBE_ROW, : self._max_probed] = 0
        inputs[PROBE_ROW, : len(probed)] = probed

    def _forward(self, bucket: int) -> MixedOutput:
        inputs, most, histories = self._inputs[:, :bucket], self.max_rows, self._histories
        decode_rows = min(most, bucket)
        capture = QueryCapture(torch.arange(decode_rows, device=inputs.device), self._heads)
        probe = ProbeCapture(self._inputs[PROBE_ROW, : self._max_probed].clamp(max=bucket - 1), self._heads)
        non_finite = torch.zeros(bucket, dtype=torch.uint8, device=inputs.device)
        batch = StepBatch(
            token_ids=input_tokens(inputs[TOKEN], inputs[SOURCE], self._last_tokens),
            positions=inputs[POSITION],
            slots=inputs[SLOT],
            offsets=inputs[OFFSET],
            logits_rows=self._inputs[LOGITS_ROW, :most],
            pool=self._pool,
            decode=DecodeRows(self._tables[0][:decode_rows], self._inputs[CONTEXT_LEN, :decode_rows].to(torch.int32)),
            prompts=PromptRows(
                self._tables[1][: self.max_prompts],
                self._inputs[PAST_LEN, : self.max_prompts].to(torch.int32),
                self._inputs[START, : self.max_prompts + 1].to(torch.int32),
            ),
            capture=capture,
            probe=probe,
            hidden=None if histories is None else histories.fixed_rows(inputs[LINE], inputs[POSITION]),
            non_finite=non_finite,
        )
        kept = self._outputs
        logits = kept.keep("logits", run_model(self._model, batch))
        best, tokens = logits.max(dim=-1)
        self._last_tokens[:most] = tokens
        return MixedOutput(
            logits,
            kept.keep("best", best),
            kept.keep_all("queries", capture.queries),
            kept.keep("non_finite of mixed steps", non_finite),
            kept.keep_all("probe queries", probe.queries),
            kept.keep_all("probe lse", probe.lse),
        )
