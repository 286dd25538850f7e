"""The attention that transformers calls in every layer, registered under the name ``forecache``.

All tokens of a step are packed into one row: first the decode rows (one token each, reading resident chunks through a
block table), then the streams (several tokens of one sequence each, reading its whole past). One call attends from all
streams to each other's own tokens and to their past in the hot pool; past outside the pool is gathered per layer, and
merged.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from forecache.kernels.attention import ops
from forecache.kernels.attention.prefill import add_segments
from forecache.workers.core.step_plan import DecodeRows
from forecache.workers.models.dense.prompt_probe import MassProbe
from forecache.workers.models.dense.streamed_past import PastReader, Store
from forecache.workers.models.step.hidden_history import HiddenRows
from forecache.workers.models.step.runner import StepAbortedError

ATTENTION_NAME = "forecache"


@dataclass(frozen=True)
class PromptRows:
    """The streams of a step on the device; see `ops.ragged_prefill`.

    ``block_table``: int32 [streams, chunks], hot slots of each stream's full chunks in the pool, then of its open chunk
    if that has tokens. ``past_lens``: int32 [streams], tokens in them. ``starts``: int32 [streams + 1], the packed
    tokens of stream *i* are ``starts[i]:starts[i + 1]``.
    """

    block_table: Tensor
    past_lens: Tensor
    starts: Tensor


@dataclass(frozen=True)
class StreamRows:
    """Packed tokens ``start:stop`` of stream ``number``, which needs more than the call for all streams: some of its
    past is outside the hot pool, or ``probe`` wants to know what it attends to."""

    number: int
    start: int
    stop: int
    probe: MassProbe | None = None


@dataclass
class QueryCapture:
    """Keeps the queries of some decode rows at the heads the indexer reads: layer → float32 [rows, heads, head_dim]."""

    rows: Tensor
    heads: dict[int, Tensor]
    queries: dict[int, Tensor] = field(default_factory=dict)

    def add(self, layer: int, q: Tensor) -> None:
        heads = self.heads.get(layer)
        if heads is not None:
            self.queries[layer] = q[self.rows][:, heads].float()


@dataclass
class ProbeCapture:
    """Keeps what a :class:`.prompt_probe.MassProbe` needs of the packed tokens ``rows``, int64 [probed].

    By layer: their queries at ``heads`` [probed, heads, head_dim], and the log-sum-exp of their attention, float32
    [probed, heads]."""

    rows: Tensor
    heads: dict[int, Tensor]
    queries: dict[int, Tensor] = field(default_factory=dict)
    lse: dict[int, Tensor] = field(default_factory=dict)

    def add(self, layer: int, q: Tensor, lse: Tensor) -> None:
        heads = self.heads.get(layer)
        if heads is not None:
            self.queries[layer], self.lse[layer] = q[self.rows][:, heads], lse[self.rows][:, heads]


@dataclass
class StepBatch:
    """One forward pass. ``token_ids``, ``positions``, ``slots``, ``offsets``: int64 [tokens], in packed order.

    Token *i* is stored in ``pool`` at ``slots[i]``, ``offsets[i]``, or nowhere where its slot is -1. ``logits_rows``:
    int64, the packed tokens whose logits are wanted. ``non_finite``: uint8 [tokens], where the step marks tokens whose
    keys or values are not finite; see `ops.store_kv`.
    """

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    offsets: Tensor
    logits_rows: Tensor
    pool: Store
    decode: DecodeRows | None
    prompts: PromptRows | None = None
    streams: tuple[StreamRows, ...] = ()
    past: PastReader | None = None
    capture: QueryCapture | None = None
    probe: ProbeCapture | None = None
    hidden: HiddenRows | None = None
    non_finite: Tensor | None = None
    aborted: Callable[[], bool] = lambda: False


@torch.compiler.disable  # type: ignore[untyped-decorator] # compiled layers break here: see compiled_layers.py
def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    forecache: StepBatch,
    **_: Any,
) -> tuple[Tensor, None]:
    """Store the new K/V, then attend: ``query`` [1, heads, tokens, head_dim] → [1, tokens, heads, head_dim].

    Raises :class:`StepAbortedError` between two layers when the step is no longer wanted.
    """
    batch = forecache
    if batch.aborted():
        raise StepAbortedError
    layer: int = module.layer_idx  # type: ignore[assignment]
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    pool = batch.pool
    ops.store_kv(k, v, pool.kv, layer, batch.slots, batch.offsets, scale=pool.scale, non_finite=batch.non_finite)
    if batch.capture is not None:
        batch.capture.add(layer, q)
    if batch.prompts is None:
        assert batch.decode is not None
        return _attend_rows(q, layer, pool, batch.decode, scaling).unsqueeze(0), None
    out, lse = _attend_prompts(q, k, v, layer, pool, batch.prompts, scaling)
    if batch.decode is not None:
        rows = len(batch.decode.context_lens)
        decoded = _attend_rows(q[:rows], layer, pool, batch.decode, scaling)
        # rows of fixed shapes that are not decode rows have no context
        out[:rows] = torch.where((batch.decode.context_lens > 0).view(-1, 1, 1), decoded, out[:rows])
    if batch.probe is not None:
        batch.probe.add(layer, q, lse)
    for stream in batch.streams:
        _finish_stream(q, out, lse, layer, stream, batch, scaling)
    return out.unsqueeze(0), None


def _attend_rows(q: Tensor, layer: int, pool: Store, rows: DecodeRows, scaling: float) -> Tensor:
    """Decode rows ``q`` [rows, heads, head_dim] over their resident chunks."""
    scale = pool.scale
    out, _lse = ops.sparse_decode(
        q,
        pool.kv,
        layer,
        rows.block_table,
        rows.context_lens,
        scaling,
        k_scale=None if scale is None else scale[:, :, 0],
        v_scale=None if scale is None else scale[:, :, 1],
    )
    return out


def _attend_prompts(
    q: Tensor, k: Tensor, v: Tensor, layer: int, pool: Store, prompts: PromptRows, scaling: float
) -> tuple[Tensor, Tensor]:
    """All packed tokens over the new tokens before them in their stream, and over its past in the pool."""
    scale = pool.scale
    return ops.ragged_prefill(
        q,
        k,
        v,
        pool.kv,
        layer,
        prompts.block_table,
        prompts.past_lens,
        prompts.starts,
        scaling,
        k_scale=None if scale is None else scale[:, :, 0],
        v_scale=None if scale is None else scale[:, :, 1],
    )


def _finish_stream(
    q: Tensor, out: Tensor, lse: Tensor, layer: int, stream: StreamRows, batch: StepBatch, scaling: float
) -> None:
    """Merge what ``stream`` has outside the pool into ``out`` and ``lse``, and show its attention to its probe."""
    own = slice(stream.start, stream.stop)
    probe = stream.probe if stream.probe is not None and stream.probe.begin(layer, q[own]) else None

    def pieces() -> Iterator[tuple[Tensor, Tensor]]:
        if batch.past is None:
            return
        for chunks, past_k, past_v in batch.past.read(stream.number, layer):
            if probe is not None:
                probe.see(layer, chunks, past_k)
            yield past_k, past_v

    out[own], lse[own] = add_segments(q[own], out[own], lse[own], pieces(), scaling)
    if probe is not None:
        probe.finish(layer, batch.pool, lse[own])


def run_model(model: Any, batch: StepBatch) -> Tensor:
    """Logits of the step ``batch``, float32 [logits rows, vocab]."""
    output = model(
        input_ids=batch.token_ids.unsqueeze(0),
        position_ids=batch.positions.unsqueeze(0),
        use_cache=False,
        logits_to_keep=batch.logits_rows,
        forecache=batch,
    )
    logits: Tensor = output.logits[0].float()
    return logits


# transformers calls it in every layer of a model that run_model runs
AttentionInterface.register(ATTENTION_NAME, attend)
