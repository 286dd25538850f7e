"""The attention that transformers calls in every layer, registered under the name ``forecache``.

All tokens of a step are packed into one row: first the decode rows (one token each, reading resident chunks through a
block table), then the streams (several tokens of one sequence each, reading its whole past, gathered per layer).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AttentionInterface

from forecache.kernels import ops
from forecache.kernels.prefill import attend_block
from forecache.kernels.reference import chunk_attention_mass

ATTENTION_NAME = "forecache"
SEGMENT_CHUNKS = 256


class StepAbortedError(Exception):
    """A sequence of the running step was cancelled; what the step computed so far is void."""


@dataclass(frozen=True)
class DecodeRows:
    """``block_table``: int32 [batch, max_chunks] of slots; ``context_lens``: int32 [batch], this token included."""

    block_table: torch.Tensor
    context_lens: torch.Tensor


@dataclass(frozen=True)
class Segment:
    """Full chunks of one store, to be read together. ``slots``, ``chunks`` (their numbers): int64 [n]."""

    kv: torch.Tensor
    slots: torch.Tensor
    chunks: torch.Tensor


@dataclass
class MassProbe:
    """Collects which chunks the last ``queries`` tokens of a prompt attend to: the first resident set (design §5.2).

    ``heads``: layer → int64 heads to look at; ``mass``: float32 [chunks], the largest share of one head's attention.
    """

    heads: dict[int, torch.Tensor]
    queries: int
    mass: torch.Tensor

    def add(
        self,
        layer: int,
        q: torch.Tensor,
        lse: torch.Tensor,
        keys: "list[tuple[torch.Tensor, torch.Tensor]]",
        scale: float,
        chunk_tokens: int,
    ) -> None:
        """``q`` [tokens, heads, head_dim], ``lse`` [tokens, heads]; ``keys``: (chunks, [kv_heads, n, head_dim])."""
        heads = self.heads.get(layer)
        if heads is None:
            return
        q, lse = q[-self.queries :], lse[-self.queries :]
        for chunks, k in keys:
            mass = chunk_attention_mass(q, k, lse, scale, chunk_tokens)[heads].amax(dim=(0, 1))
            self.mass[chunks] = torch.maximum(self.mass[chunks], mass)


@dataclass(frozen=True)
class StreamRows:
    """Packed tokens ``start:stop`` of one sequence, after a past of full ``segments`` and ``open_tokens`` tokens more.

    ``open_slot`` is the pool slot those are in (0 where there are none); ``first_open_chunk`` its chunk number.
    """

    start: int
    stop: int
    segments: tuple[Segment, ...]
    open_slot: int
    open_tokens: int
    first_open_chunk: int
    probe: MassProbe | None = None


@dataclass
class QueryCapture:
    """Keeps the queries of some decode rows at the heads the indexer reads: layer → float32 [rows, heads, head_dim]."""

    rows: torch.Tensor
    heads: dict[int, torch.Tensor]
    queries: dict[int, torch.Tensor] = field(default_factory=dict)

    def add(self, layer: int, q: torch.Tensor) -> None:
        heads = self.heads.get(layer)
        if heads is not None:
            self.queries[layer] = q[self.rows][:, heads].float()


@dataclass(frozen=True)
class StepBatch:
    """One forward pass. ``token_ids``, ``positions``, ``slots``, ``offsets``: int64 [tokens], in packed order.

    ``kv`` is the pool's view [slots, layers, 2, kv_heads, chunk_tokens, head_dim]; token *i* is stored at ``slots[i]``,
    ``offsets[i]``. ``logits_rows``: int64, the packed tokens whose logits are wanted.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    offsets: torch.Tensor
    logits_rows: torch.Tensor
    kv: torch.Tensor
    decode: DecodeRows | None
    streams: tuple[StreamRows, ...]
    capture: QueryCapture | None
    aborted: Callable[[], bool]


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    forecache: StepBatch,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Store the new K/V, then attend: ``query`` [1, heads, tokens, head_dim] → [1, tokens, heads, head_dim].

    Raises :class:`StepAbortedError` between two layers when the step is no longer wanted.
    """
    batch = forecache
    if batch.aborted():
        raise StepAbortedError
    layer: int = module.layer_idx  # type: ignore[assignment]
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    ops.store_kv(k, v, batch.kv, layer, batch.slots, batch.offsets)
    out = torch.empty_like(q)
    if batch.decode is not None:
        rows = batch.decode.block_table.shape[0]
        out[:rows], _lse = ops.sparse_decode(
            q[:rows], batch.kv, layer, batch.decode.block_table, batch.decode.context_lens, scaling
        )
    for stream in batch.streams:
        rows_of = slice(stream.start, stream.stop)
        out[rows_of] = _attend_stream(q[rows_of], k[rows_of], v[rows_of], batch.kv, layer, stream, scaling)
    if batch.capture is not None:
        batch.capture.add(layer, q)
    return out.unsqueeze(0), None


def _attend_stream(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv: torch.Tensor,
    layer: int,
    stream: StreamRows,
    scaling: float,
) -> torch.Tensor:
    """Exact attention of one sequence's new tokens to themselves and to all before them."""
    out, lse = attend_block(q, k.transpose(0, 1), v.transpose(0, 1), scaling, causal=True)
    probed: list[tuple[torch.Tensor, torch.Tensor]] = []
    probing = stream.probe is not None and layer in stream.probe.heads
    for chunks, past_k, past_v in _past(kv, layer, stream):
        out, lse = ops.merge_partials(out, lse, *attend_block(q, past_k, past_v, scaling, causal=False))
        if probing and chunks is not None:
            probed.append((chunks, past_k))
    if probing:
        assert stream.probe is not None
        chunk_tokens = kv.shape[4]
        # the open chunk's older tokens complete the new ones to whole chunks
        own_k = k.transpose(0, 1)
        if stream.open_tokens:
            own_k = torch.cat((kv[stream.open_slot, layer, 0, :, : stream.open_tokens], own_k), dim=1)
        count = -(-own_k.shape[1] // chunk_tokens)
        own = torch.arange(stream.first_open_chunk, stream.first_open_chunk + count, device=k.device)
        probed.append((own, own_k))
        stream.probe.add(layer, q, lse, probed, scaling, chunk_tokens)
    return out


def _past(
    kv: torch.Tensor, layer: int, stream: StreamRows
) -> Iterator[tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]]:
    """(chunk numbers or ``None`` for the open chunk, k, v) of what came before, in pieces of bounded size."""
    for segment in stream.segments:
        for start in range(0, len(segment.slots), SEGMENT_CHUNKS):
            piece = slice(start, start + SEGMENT_CHUNKS)
            yield segment.chunks[piece], *ops.gather_layer(segment.kv, layer, segment.slots[piece])
    if stream.open_tokens:
        open_kv = kv[stream.open_slot, layer, :, :, : stream.open_tokens]
        yield None, open_kv[0], open_kv[1]


AttentionInterface.register(ATTENTION_NAME, attend)
