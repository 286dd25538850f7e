"""The attention that transformers calls in every layer, registered under the name ``forecache``.

All tokens of a step are packed into one row: first the decode rows (one token each, reading resident chunks through a
block table), then the streams (several tokens of one sequence each, reading its whole past, gathered per layer).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from forecache.kernels.attention import ops
from forecache.kernels.attention.prefill import prefill_attention
from forecache.workers.core.step_plan import DecodeRows
from forecache.workers.models.dense.prompt_probe import MassProbe
from forecache.workers.models.dense.streamed_past import PastReader, Store
from forecache.workers.models.step.hidden_history import HiddenRows
from forecache.workers.models.step.runner import StepAbortedError

ATTENTION_NAME = "forecache"


@dataclass(frozen=True)
class StreamRows:
    """Packed tokens ``start:stop`` of one sequence, after a past of full chunks and ``open_tokens`` tokens more.

    ``open_slot``: int64 [1], the pool slot those are in; ``first_open_chunk`` its chunk number.
    """

    start: int
    stop: int
    open_slot: Tensor
    open_tokens: int
    first_open_chunk: int
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
    streams: tuple[StreamRows, ...] = ()
    past: PastReader | None = None
    capture: QueryCapture | None = None
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
    rows = 0 if batch.decode is None else len(batch.decode.context_lens)
    if batch.decode is not None and rows == len(q):
        return _attend_rows(q, layer, pool, batch.decode, scaling).unsqueeze(0), None
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    if batch.decode is not None:
        out[:rows] = _attend_rows(q[:rows], layer, pool, batch.decode, scaling)
    for number, stream in enumerate(batch.streams):
        own = slice(stream.start, stream.stop)
        assert batch.past is not None
        past = _past(layer, number, batch.past, pool, stream, q.dtype)
        out[own] = _attend_stream(q[own], k[own], v[own], layer, stream, past, scaling)
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


def _attend_stream(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer: int,
    stream: StreamRows,
    past: Iterator[tuple[Tensor, Tensor, Tensor]],
    scaling: float,
) -> Tensor:
    """Exact attention of one sequence's new tokens to themselves and to all before them."""
    probe = stream.probe if stream.probe is not None and stream.probe.begin(layer, q) else None
    own_k, own_v = k.transpose(0, 1), v.transpose(0, 1)
    open_k = own_k[:, :0]

    def pieces() -> Iterator[tuple[Tensor, Tensor]]:
        nonlocal open_k
        for chunks, past_k, past_v in past:
            if len(chunks) == 0:
                open_k = past_k
            elif probe is not None:
                probe.see(layer, chunks, past_k)
            yield past_k, past_v

    out, lse = prefill_attention(q, own_k, own_v, pieces(), scaling)
    if probe is not None:
        # the open chunk's older tokens complete the new ones to whole chunks
        keys = torch.cat((open_k, own_k), dim=1)
        count = -(-keys.shape[1] // probe.chunk_tokens)
        probe.see(layer, torch.arange(count, device=k.device) + stream.first_open_chunk, keys, own=True)
        probe.finish(layer, lse)
    return out


def _past(
    layer: int, number: int, reader: PastReader, pool: Store, stream: StreamRows, dtype: torch.dtype
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(chunk numbers, k, v) of what came before stream ``number``; the open chunk comes last, without a number."""
    yield from reader.read(number, layer)
    if stream.open_tokens:
        k, v = ops.gather_layer(pool.kv, layer, stream.open_slot, scale=pool.scale, dtype=dtype)
        yield stream.open_slot[:0], k[:, : stream.open_tokens], v[:, : stream.open_tokens]


# transformers calls it in every layer of a model that ModelRunner._forward runs
AttentionInterface.register(ATTENTION_NAME, attend)
