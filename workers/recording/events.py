"""The exact attention of a model's heads on chunks, by log-sum-exp per chunk, without a full attention matrix."""

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK_LOGITS = 1 << 25
"""Logits in memory at a time, about 128 MiB in float32."""


@dataclass(frozen=True)
class AttentionEvents:
    """Retrieval events, sorted by row; see :class:`forecache.indexer.records.shards.RecordedDocument`."""

    offsets: Tensor
    chunk: Tensor
    head: Tensor
    share: Tensor
    peak_share: Tensor
    bounds_score: Tensor


def chunk_lse(
    queries: Tensor, keys: Tensor, positions: Tensor, *, scale: float, chunk_tokens: int, chunks: int
) -> Tensor:
    """Log-sum-exp of the scaled logits of each chunk's tokens up to the query's position: float32 [heads, steps,
    chunks].

    ``queries`` [heads, steps, head_dim], ``keys`` [kv_heads, tokens, head_dim], ``positions`` int64 [steps]. The last
    chunk may be partly filled; chunks after the query's position have -inf.
    """
    heads, steps, head_dim = queries.shape
    kv_heads, tokens, _ = keys.shape
    grouped = queries.float().reshape(kv_heads, -1, head_dim) * scale
    lse = queries.new_full((heads, steps, chunks), -torch.inf, dtype=torch.float32)
    block = max(1, BLOCK_LOGITS // (heads * steps * chunk_tokens)) * chunk_tokens
    for start in range(0, min(tokens, chunks * chunk_tokens), block):
        stop = min(start + block, tokens)
        logits = (grouped @ keys[:, start:stop].float().transpose(1, 2)).view(heads, steps, stop - start)
        places = torch.arange(start, stop, device=keys.device)
        logits.masked_fill_(places > positions.unsqueeze(1), -torch.inf)
        if missing := -(stop - start) % chunk_tokens:
            logits = torch.nn.functional.pad(logits, (0, missing), value=-torch.inf)
        first = start // chunk_tokens
        parts = logits.view(heads, steps, -1, chunk_tokens).logsumexp(3)
        lse[:, :, first : first + parts.shape[2]] = parts
    return lse


def bounds_lse(queries: Tensor, keys: Tensor, *, scale: float, chunk_tokens: int, chunks: int) -> Tensor:
    """Upper bounds of q·k in each whole chunk, Σ_d max(q_d·min_d, q_d·max_d) (Quest, arXiv 2406.10774).

    Shapes as for :func:`chunk_lse`. The zero rows of a last chunk that is not full count as keys.
    """
    heads, steps, head_dim = queries.shape
    kv_heads = keys.shape[0]
    whole = torch.nn.functional.pad(keys.float(), (0, 0, 0, chunks * chunk_tokens - keys.shape[1]))
    by_chunk = whole.view(kv_heads, chunks, chunk_tokens, head_dim)
    scaled = queries.float().reshape(kv_heads, -1, head_dim) * scale
    low, high = by_chunk.amin(2).transpose(1, 2), by_chunk.amax(2).transpose(1, 2)
    return (scaled.clamp(max=0) @ low + scaled.clamp(min=0) @ high).view(heads, steps, chunks)


def find_events(
    queries: Tensor, keys: Tensor, positions: Tensor, *, scale: float, chunk_tokens: int, event_mass: float
) -> AttentionEvents:
    """Retrieval events of every head of every layer at every step.

    ``queries`` [layers, heads, steps, head_dim], ``keys`` [layers, kv_heads, tokens, head_dim], ``positions`` int64
    [steps]. An event is an attention share of at least ``event_mass`` on a chunk that is complete and not the first.
    """
    layers, heads, steps, _ = queries.shape
    chunks = -(-keys.shape[2] // chunk_tokens)
    complete = (positions + 1) // chunk_tokens
    numbers = torch.arange(chunks, device=keys.device)
    open_chunk = (numbers >= complete.unsqueeze(1)).unsqueeze(0)
    peak = torch.zeros(steps, chunks, device=keys.device)
    bounds = torch.zeros(steps, chunks, device=keys.device)
    rows, found, owners, shares = [], [], [], []
    for layer in range(layers):
        lse = chunk_lse(queries[layer], keys[layer], positions, scale=scale, chunk_tokens=chunk_tokens, chunks=chunks)
        share = (lse - lse.logsumexp(2, keepdim=True)).exp().masked_fill_(open_chunk, 0)
        torch.maximum(peak, share.amax(0), out=peak)
        upper = bounds_lse(queries[layer], keys[layer], scale=scale, chunk_tokens=chunk_tokens, chunks=chunks)
        upper = torch.where(open_chunk, lse, upper)
        bounds += upper.softmax(2).masked_fill_(open_chunk, 0).sum(0)
        head, row, chunk = (share[:, :, 1:] >= event_mass).nonzero(as_tuple=True)
        rows.append(row)
        found.append(chunk + 1)
        owners.append(head + layer * heads)
        shares.append(share[head, row, chunk + 1])
    row = torch.cat(rows)
    order = row.argsort(stable=True)
    offsets = torch.zeros(steps + 1, dtype=torch.int64, device=keys.device)
    offsets[1:] = torch.bincount(row, minlength=steps).cumsum(0)
    return AttentionEvents(
        offsets=offsets,
        chunk=torch.cat(found)[order].int(),
        head=torch.cat(owners)[order].short(),
        share=torch.cat(shares)[order].half(),
        peak_share=peak.half(),
        bounds_score=(bounds / (layers * heads)).half(),
    )
