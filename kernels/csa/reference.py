"""Compressed Sparse Attention at decode in plain PyTorch: the CPU backend, and the reference for the Triton kernels.

DeepSeek-V4's Lightning Indexer scores the compressed entries of a sequence and selects the best. Attention reads those
and a sliding window. An entry, or a token of the window, is one vector that is both key and value for all heads.

``entries`` is one layer of a field of the hot pool, ``[slots, chunk_entries, dim]`` with any slot stride: compressed
entries, index keys, or the windows of all sequences, one slot each. ``block_table``: integer ``[batch, max_chunks]`` of
slots. ``lens``: integer ``[batch]``, entries of each sequence. Entry ``i`` of sequence ``b`` is at position ``i %
chunk_entries`` of slot ``block_table[b, i // chunk_entries]``. Memory past a sequence's end does not affect results.
"""

import math

import torch
from torch import Tensor

from forecache.kernels.common import checks


def score_entries(q: Tensor, weights: Tensor, keys: Tensor, block_table: Tensor, lens: Tensor) -> Tensor:
    """Scores of the resident entries: ``Σ_h w_h relu(q_h · k)`` (DeepSeek-V4, §2.3.1).

    Args:
        q: ``[batch, index_heads, index_dim]``.
        weights: float32 ``[batch, index_heads]``, already multiplied by ``index_dim^-½ · index_heads^-½``.
        keys: ``[slots, chunk_entries, index_dim]``, the index keys of one layer.

    Returns:
        float32 ``[batch, max_chunks · chunk_entries]``, -inf past a sequence's end.
    """
    checks.entries(q, keys, block_table, lens)
    assert weights.shape == q.shape[:2], f"weights {tuple(weights.shape)} of queries {tuple(q.shape)}"
    work = _work_dtype(q)
    held = _held(keys, block_table, lens)
    k = keys[block_table.long()].flatten(1, 2).to(work).masked_fill(~held.unsqueeze(2), 0)
    return index_logits(q.to(work), weights.to(work), k).masked_fill(~held, -math.inf).float()


def index_logits(q: Tensor, weights: Tensor, keys: Tensor) -> Tensor:
    """``Σ_h w_h relu(q_h · k)`` (DeepSeek-V4, §2.3.1) of each key, for several steps, differentiable.

    ``q``: ``[steps, heads, dim]``, ``weights``: ``[steps, heads]``, ``keys``: ``[n, dim]`` or ``[steps, n, dim]``, all
    of one dtype. Returns ``[steps, n]`` of that dtype.
    """
    # weights may be negative, so the products are rectified before they are weighted and summed
    return torch.bmm(weights.unsqueeze(1), (q @ keys.transpose(-1, -2)).relu_()).squeeze(1)


def top_entries(scores: Tensor, k: int) -> Tensor:
    """The ``k`` best entries of each row, int32 ``[batch, k]``, ascending; -1 where a row has fewer.

    Of equal scores (-0.0 equals 0.0) the entry with the lower number is taken, so that the result is deterministic.
    Entries with -inf are never taken.
    """
    assert scores.dim() == 2 and k > 0
    batch, entries = scores.shape
    found = torch.full((batch, k), -1, dtype=torch.int32, device=scores.device)
    taken = min(k, entries)
    # a stable sort keeps the order of equal scores, which topk does not guarantee
    order = (scores + 0.0).sort(dim=1, descending=True, stable=True).indices[:, :taken]
    valid = scores.gather(1, order) > -math.inf
    # invalid places are sorted behind all others
    ascending = order.masked_fill(~valid, entries).sort(1).values
    found[:, :taken] = ascending.masked_fill(ascending == entries, -1).int()
    return found


def attend_entries(
    q: Tensor, entries: Tensor, block_table: Tensor, lens: Tensor, scale: float, *, selected: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of one token per sequence over entries that are both key and value, without sinks.

    Args:
        q: ``[batch, heads, dim]``.
        entries: ``[slots, chunk_entries, dim]``.
        scale: factor of the logits.
        selected: int32 ``[batch, k]``, from :func:`top_entries`: attend to these entries only; -1, anywhere in the
            row, is no entry. None: attend to all entries.

    Returns:
        out float32 ``[batch, heads, dim]`` and lse float32 ``[batch, heads]``, the log of the sum of exp(logits). A
        sequence without entries has out 0 and lse -inf.
    """
    checks.entries(q, entries, block_table, lens)
    work, chunk_entries = _work_dtype(q), entries.shape[1]
    if selected is None:
        held = _held(entries, block_table, lens)
        kv = entries[block_table.long()].flatten(1, 2)
    else:
        held = (selected >= 0) & (selected < lens.unsqueeze(1))
        place = selected.long().masked_fill(~held, 0)
        slots = block_table.long().gather(1, place // chunk_entries)
        kv = entries[slots, place % chunk_entries]
    kv = kv.to(work).masked_fill(~held.unsqueeze(2), 0)
    logits = (q.to(work) @ kv.transpose(1, 2)).mul_(scale).masked_fill_(~held.unsqueeze(1), -math.inf)
    lse = logits.logsumexp(2)
    shift = lse.masked_fill(lse == -math.inf, 0)
    return ((logits - shift.unsqueeze(2)).exp() @ kv).float(), lse.float()


def merge_with_sinks(parts: list[tuple[Tensor, Tensor]], sinks: Tensor, dtype: torch.dtype) -> Tensor:
    """Attention over the union of disjoint sets and the sinks, from the attention over each set.

    Args:
        parts: (out ``[batch, heads, dim]``, lse ``[batch, heads]``) of each.
        sinks: ``[heads]``, one logit per head. A sink's value vector is zero, so it only takes attention mass.

    Returns:
        ``[batch, heads, dim]`` of ``dtype``.
    """
    sink = sinks.float().expand_as(parts[0][1])
    lse = torch.stack([sink, *(lse for _, lse in parts)]).logsumexp(0)
    merged = sum(out * (part - lse).exp().unsqueeze(2) for out, part in parts)
    assert isinstance(merged, Tensor)
    return merged.to(dtype)


def csa_decode(
    q: Tensor,
    entries: Tensor,
    block_table: Tensor,
    lens: Tensor,
    window: Tensor,
    window_slots: Tensor,
    window_lens: Tensor,
    sinks: Tensor,
    scale: float,
    *,
    selected: Tensor | None = None,
) -> Tensor:
    """Attention over selected compressed entries, the sliding window and the sinks; ``[batch, heads, dim]`` like ``q``.

    Args:
        q, entries, block_table, lens, scale, selected: as in :func:`attend_entries`. Without ``selected`` the token
            attends to all entries (Heavily Compressed Attention).
        window: ``[window slots, window_tokens, dim]``, one slot per sequence, a ring buffer. The order of its tokens
            does not matter, because RoPE is already applied.
        window_slots, window_lens: integer ``[batch]``, the slot of each sequence, and its tokens including the new one.
        sinks: ``[heads]``.
    """
    near = attend_entries(q, window, window_slots.unsqueeze(1), window_lens, scale)
    far = attend_entries(q, entries, block_table, lens, scale, selected=selected)
    return merge_with_sinks([far, near], sinks, q.dtype)


def _work_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _held(entries: Tensor, block_table: Tensor, lens: Tensor) -> Tensor:
    """Which places of the block tables hold entries, bool ``[batch, max_chunks · chunk_entries]``."""
    places = torch.arange(block_table.shape[1] * entries.shape[1], device=lens.device)
    return places < lens.unsqueeze(1)
